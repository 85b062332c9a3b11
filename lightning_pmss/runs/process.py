"""Run a command as a process with a group and a log of its own.

A process returns all memory at its end, may crash without harm, and takes any strategy. What it has started ends with it. If
the process that started it is stopped or killed, it is asked to stop too (`stop_with_parent`), so that it saves a checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PROGRAM = (sys.executable, "-m", "lightning_pmss")
"""What starts this library's command line."""
REFUSED = 2
"""Status of a command that could not do what was typed; its last words say what to type instead."""
STARTED_BY = "LIGHTNING_PMSS_STARTED_BY"
"""The environment variable with the end of a pipe that closes when the starting process ends."""
STOPPING = "stopping after this step, to save a checkpoint; Ctrl-C again stops at once"
"""What a command tells its user on Ctrl-C, while a run stops."""
_GRACE = 300.0  # seconds that a stopped run has for its checkpoint
_READ = 2**16
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Args:
        status: Its exit status; ``-N`` where signal N ended it.
        seconds: How long it ran.
        last_lines: The end of what it wrote.
    """

    status: int
    seconds: float
    last_lines: str

    @property
    def refused(self) -> str | None:
        """What a command of this library refused to do, null if it did not."""
        found = re.search(r"^\S.*?: error: (.+)", self.last_lines, re.MULTILINE | re.DOTALL)
        return found[1].strip() if self.status == REFUSED and found else None

    @property
    def how(self) -> str:
        """Its end in words."""
        if self.status >= 0:
            return f"exit status {self.status}"
        name = signal.Signals(-self.status).name
        return f"{name}, as the kernel sends it when memory runs out" if name == "SIGKILL" else name


def run_process(
    command: Sequence[str],
    log: Path,
    *,
    environment: Mapping[str, str] | None = None,
    meanwhile: Callable[[], object] | None = None,
    stopping: Callable[[], object] | None = None,
    every: float = 1.0,
    lines: int = 15,
) -> Ended:
    """Run a command to its end. An exception meanwhile, as Ctrl-C raises it, first stops the process.

    Args:
        command: The program and its arguments, such as ``[*PROGRAM, "fit", ...]``.
        log: File that what it writes is appended to.
        environment: Variables beside those of this process.
        meanwhile: Called while it runs.
        stopping: Called when the process has been asked to stop, which may take it a while.
        every: Seconds between two calls of ``meanwhile``.
        lines: How many of its last lines to return.

    Raises:
        OSError: The program or the log cannot be opened.
        KeyboardInterrupt: On Ctrl-C, after the process has saved its checkpoint and ended; a second Ctrl-C kills it.
    """
    started = time.monotonic()
    ours, theirs = None, None
    with log.open("ab") as output:
        start = output.tell()
        theirs, ours = os.pipe()
        try:
            process = subprocess.Popen(  # noqa: S603
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {}), STARTED_BY: str(theirs)},
                pass_fds=(theirs,),
                start_new_session=True,  # Ctrl-C reaches this process alone, which then stops the other one in order
            )
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
    try:
        status = _waited(process, meanwhile, every)
    except BaseException:
        _stop(process, stopping)
        raise
    finally:
        os.close(ours)
        _signal_group(process, signal.SIGKILL)  # what it has started and left behind
    return Ended(status, time.monotonic() - started, _tail(log, start, lines))


def _waited(process: subprocess.Popen[bytes], meanwhile: Callable[[], object] | None, every: float) -> int:
    while True:
        try:
            return process.wait(every)
        except subprocess.TimeoutExpired:
            if meanwhile is not None:
                meanwhile()


def _stop(process: subprocess.Popen[bytes], stopping: Callable[[], object] | None) -> None:
    """Ask for a checkpoint and wait for the end."""
    _signal_group(process, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
        if stopping is not None:
            stopping()
        process.wait(_GRACE)
    _signal_group(process, signal.SIGKILL)
    process.wait()


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: the group has ended
        os.killpg(process.pid, number)


def _tail(log: Path, start: int, lines: int) -> str:
    """The last lines since ``start``, each as a terminal shows it at its end."""
    with log.open("rb") as file:
        file.seek(max(start, file.seek(0, os.SEEK_END) - _READ))
        text = file.read().decode("utf-8", errors="replace")
    shown = (_ESCAPES.sub("", line).rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n"))
    kept = ["".join(char if char.isprintable() else "?" for char in line) for line in shown if line]
    return "\n".join(kept[-lines:])


def stop_with_parent() -> bool:
    """Let this process get SIGTERM when the one that started it by `run_process` has ended, however that happened.

    Returns:
        Whether `run_process` started it.
    """
    end = os.environ.pop(STARTED_BY, None)
    if end is None:
        return False

    def wait() -> None:
        with contextlib.suppress(OSError):
            while os.read(int(end), 1):
                pass
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="stop_with_parent", daemon=True).start()
    return True
