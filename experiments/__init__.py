"""The evidence: studies of how PMSS and its rivals learn, one JSON a run, and the page made of them (docs/evidence.md)."""
