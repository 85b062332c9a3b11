"""Watch processes that a test has started: a kill takes effect some time after the call that sends it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent does not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except ProcessLookupError:
        return False
    except FileNotFoundError:  # it has just ended, or there is no /proc
        return not Path("/proc").exists()


def wait_for(condition: Callable[[], object], seconds: float = 60, *, what: str = "") -> None:
    """Return when the condition holds; fail after so many seconds without, and say what was waited for."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds:g} s: {what}"
        time.sleep(0.02)


def await_end(pid: int) -> None:
    """Return when the process no longer runs."""
    wait_for(lambda: not alive(pid), what=f"process {pid} ends")
