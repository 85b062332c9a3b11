"""Models that a strategy keeps in parts: gathering, wrapping, agreement of ranks."""
