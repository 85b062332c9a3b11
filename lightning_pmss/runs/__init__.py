"""Runs of ``fit`` as processes of their own, for commands that need many of them; a callback inside writes the scores."""
