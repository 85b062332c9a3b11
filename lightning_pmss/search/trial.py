"""Run one trial as a process of its own, which ends with the process that started it."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lightning_pmss.messages import one_line
from lightning_pmss.runs.guard import GUARD
from lightning_pmss.runs.process import run_process
from lightning_pmss.search.result import read_result

OUTPUT = "output.txt"
CONFIG = "config.yaml"
_LAST_LINES = 12


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
    """Runs ``fit`` in a process group of its own, which is killed when this process ends.

    Args:
        launcher: The words before ``-m lightning_pmss fit``, such as this Python or ``torchrun --nproc-per-node 8``.
        stopping: Called when a training has been asked to stop, which may take it a while.
    """

    def __init__(
        self, launcher: Sequence[str] = (sys.executable,), stopping: Callable[[], object] | None = None
    ) -> None:
        self.launcher, self.stopping = list(launcher), stopping

    def __call__(self, assignment: Assignment) -> Outcome:
        """Run it to its end.

        Raises:
            BaseException: What interrupts the wait; the training's processes have ended then.
        """
        folder = assignment.folder
        (folder / CONFIG).write_text(assignment.config, encoding="utf-8")
        command = [*GUARD, *self.launcher, "-m", "lightning_pmss", "fit", "--config", str(folder / CONFIG)]
        if assignment.checkpoint is not None:
            command += ["--ckpt_path", assignment.checkpoint]
        ended = run_process(command, folder / OUTPUT, stopping=self.stopping, lines=_LAST_LINES)
        return outcome(folder, ended.status, ended.last_lines)


def outcome(folder: Path, status: int, last_lines: str) -> Outcome:
    """Read how the training in a folder ended.

    Args:
        folder: The trial's folder.
        status: Exit status of its process.
        last_lines: The end of its output.
    """
    lines = last_lines.splitlines()
    try:
        result = read_result(folder)
    except ValueError as error:
        return Outcome("failed", message=one_line(error), lines=lines)
    if result is not None and (status == 0 or result.state == "diverged"):
        return Outcome(result.state, result.score, result.untrained, result.checkpoint, result.message)
    return Outcome("failed", message=one_line(_reason(status, lines)), lines=lines)


def _reason(status: int, lines: Sequence[str]) -> str:
    number = -status if status < 0 else status - 128
    if number > 0:
        known = number in signal.valid_signals()
        name = signal.Signals(number).name if known else str(number)
        return f"ended by signal {name}" + (
            ", as the kernel sends it when memory runs out" if name == "SIGKILL" else ""
        )
    if status == 0:
        return "ended without a result; is `lightning_pmss.search.stop.StopAtFraction` among its callbacks?"
    found = next((line for line in reversed(lines) if re.search(r"[Ee]rror|[Ee]xception", line)), "")
    return found or (lines[-1] if lines else f"exit status {status}, and no output")
