"""Run one trial as a process of its own, which ends with the process that started it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lightning_pmss.messages import one_line
from lightning_pmss.search.result import read_result

OUTPUT = "output.txt"
CONFIG = "config.yaml"
_LAST_LINES = 12
_PATIENCE = 10.0  # seconds in which a stopped trial may save what it wants to


@dataclass(frozen=True)
class Assignment:
    """A training to be run.

    Attributes:
        folder: The trial's folder, which exists.
        config: Whole configuration for ``fit``.
        checkpoint: Where the training goes on; None: it begins.
    """

    folder: Path
    config: str
    checkpoint: str | None = None


@dataclass(frozen=True)
class Outcome:
    """How a training ended.

    Attributes:
        state: ``stopped``, ``ended`` or ``diverged`` (see `Result`); ``failed``: by a crash.
        score: The monitored metric; None if it diverged or failed.
        untrained: The metric of the untrained model, where it was measured.
        checkpoint: Where it can go on; None if nothing is left to train.
        message: Why it has no score.
        lines: Last lines of its output, if it failed.
    """

    state: Literal["stopped", "ended", "diverged", "failed"]
    score: float | None = None
    untrained: float | None = None
    checkpoint: str | None = None
    message: str = ""
    lines: Sequence[str] = field(default=())


Runner = Callable[[Assignment], Outcome]


class ProcessRunner:
    """Runs ``fit`` in a process group of its own.

    Args:
        launcher: The words before ``-m lightning_pmss fit``, such as this Python or ``torchrun --nproc-per-node 8``.
    """

    def __init__(self, launcher: Sequence[str] = (sys.executable,)) -> None:
        self.launcher = list(launcher)

    def __call__(self, assignment: Assignment) -> Outcome:
        """Run it to its end.

        Raises:
            BaseException: What interrupts the wait; the training's processes have ended then.
        """
        folder = assignment.folder
        (folder / CONFIG).write_text(assignment.config, encoding="utf-8")
        command = [*self.launcher, "-m", "lightning_pmss", "fit", "--config", str(folder / CONFIG)]
        if assignment.checkpoint is not None:
            command += ["--ckpt_path", assignment.checkpoint]
        with (folder / OUTPUT).open("ab") as output:
            guard = subprocess.Popen(  # noqa: S603
                [sys.executable, "-m", "lightning_pmss.search.guard", *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            code = guard.wait()
        except BaseException:
            _send(guard, signal.SIGTERM)
            _wait(guard, _PATIENCE)
            raise
        finally:
            _send(guard, signal.SIGKILL)  # whatever the training has left behind
            guard.wait()
            if guard.stdin is not None:
                guard.stdin.close()
        return outcome(folder, code)


def outcome(folder: Path, code: int) -> Outcome:
    """Read how the training in a folder ended.

    Args:
        folder: The trial's folder.
        code: Exit code of its process.
    """
    try:
        result = read_result(folder)
    except ValueError as error:
        return Outcome("failed", message=one_line(error), lines=last_lines(folder))
    if result is not None and (code == 0 or result.state == "diverged"):
        return Outcome(result.state, result.score, result.untrained, result.checkpoint, result.message)
    lines = last_lines(folder)
    if code > 128:
        reason = f"ended by signal {_signal_name(code - 128)}"
        reason += " (out of memory?)" if code - 128 == signal.SIGKILL else ""
    elif code == 0:
        reason = "ended without a result; is `lightning_pmss.search.stop.StopAtFraction` among its callbacks?"
    else:
        reason = next((line for line in reversed(lines) if re.search(r"[Ee]rror|[Ee]xception", line)), "")
        reason = reason or (lines[-1] if lines else f"exit code {code}, and no output")
    return Outcome("failed", message=one_line(reason), lines=lines)


def last_lines(folder: Path) -> list[str]:
    """Return the last lines of a trial's output."""
    try:
        text = (folder / OUTPUT).read_bytes()[-20_000:].decode(errors="replace")
    except FileNotFoundError:
        return []
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in text.splitlines()]
    return [one_line(line) for line in lines if line.strip()][-_LAST_LINES:]


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)


def _send(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Signal the process group, if anything of it is left."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
