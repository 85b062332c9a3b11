"""Generated texts of one evaluation: gathered from all processes, each example once, written as JSON lines."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TypedDict

import torch.distributed as dist


class Prediction(TypedDict):
    """One line of a predictions file; `correct` is None where no metric or no target was at hand."""

    id: int
    prompt: str
    output: str
    target: Any
    correct: bool | None


def gather_predictions(rows: list[Prediction]) -> list[Prediction]:
    """The rows of all processes in the order of their ids, each id once.

    Lightning's distributed sampler repeats examples to fill the last round; counted twice they would bias the score.
    """
    parts = [rows]
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        parts = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(parts, rows)
    unique = {row["id"]: row for part in parts for row in part}
    return [unique[key] for key in sorted(unique)]


def write_predictions(rows: list[Prediction], path: Path) -> None:
    """Write one JSON object per line; a file of an earlier evaluation is replaced only by a complete new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".part")
    with scratch.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(scratch, path)
