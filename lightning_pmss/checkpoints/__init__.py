"""Lightning checkpoints of a converted module: contents, checks, restoring, and extraction of the adapter."""
