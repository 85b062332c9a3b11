"""The switch that shows tracebacks on the command line."""

from __future__ import annotations

import os

DEBUG = "JSONARGPARSE_DEBUG"
"""The environment variable that shows the traceback of every error; jsonargparse's own."""


def debugging() -> bool:
    """Whether tracebacks are wanted."""
    wanted = os.environ.get(DEBUG, "").lower() not in ("", "0", "false", "no")
    if DEBUG in os.environ:
        os.environ[DEBUG] = str(wanted).lower()  # jsonargparse knows "true" and "false" alone
    return wanted
