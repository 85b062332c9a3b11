"""Sharded models: gathering, wrapping, agreement of ranks."""
