"""The file in which a trial leaves its score for the process that started it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lightning_pmss.store import Record, checked, read_json
from lightning_pmss.store.disk import atomic_file

RESULT = "result.json"


class Result(Record):
    """How a trial ended.

    Attributes:
        state: ``stopped``: at its fraction; ``ended``: by itself, at the end of the training or before its fraction;
            ``diverged``: without a score that is of use.
        step: Optimizer steps taken.
        steps: Optimizer steps of the whole training.
        score: The monitored metric at the end; None if it diverged.
        untrained: The metric before the first step; None if it was not measured.
        checkpoint: Where the trial can go on; None if nothing is left to train.
        message: What diverged, else "".
    """

    state: Literal["stopped", "ended", "diverged"]
    step: int
    steps: int
    score: float | None = None
    untrained: float | None = None
    checkpoint: str | None = None
    message: str = ""


def write_result(folder: Path, result: Result) -> None:
    """Write the result into a trial's folder."""
    with atomic_file(folder / RESULT) as new:
        new.write_text(result.model_dump_json(indent=2), encoding="utf-8")


def read_result(folder: Path) -> Result | None:
    """Read a trial's result; None if the trial has left none.

    Raises:
        ValueError: The file is damaged.
    """
    path = folder / RESULT
    if not path.exists():
        return None
    remedy = "Remove it, and the trial is run again."
    return checked(Result, read_json(path, remedy), str(path), remedy)
