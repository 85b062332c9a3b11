"""Gather the generated texts of an evaluation from all processes, each example once, and write them as JSON lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypedDict

import torch.distributed as dist

from lightning_pmss.evaluation.records import write_records


class Prediction(TypedDict):
    """Required fields of a line of a predictions file; ``correct`` is None without a metric or a target."""

    id: int
    prompt: str
    output: str
    target: Any
    correct: bool | None


def gather(value: Any) -> list[Any]:
    """Gather the value of each process, in the order of their ranks."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return [value]
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, value)
    return parts


def gather_predictions(rows: list[Prediction]) -> list[Prediction]:
    """Gather the rows of all processes in the order of their ids, each id once.

    Lightning's distributed sampler repeats examples to fill the last batch; repeated ones would bias the score.
    """
    unique = {row["id"]: row for part in gather(rows) for row in part}
    return [unique[key] for key in sorted(unique)]


def write_predictions(rows: list[Prediction], path: Path) -> None:
    """Write one JSON object per line; a file of an earlier evaluation is replaced only by a complete new one."""
    write_records(rows, path)
