"""A search whose trainings are a function: a score that is known for each setting."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from lightning_pmss.search.result import Result, write_result
from lightning_pmss.search.search import Plan, Search
from lightning_pmss.search.space import Settings, Space, space_of
from lightning_pmss.search.storage import open_storage
from lightning_pmss.search.trial import Assignment, Outcome
from lightning_pmss.search.workers import Worker

SPACE = {
    "options": {"lr": {"low": 1e-5, "high": 1.0, "log": True}},
    "methods": {"A": {"rank": {"choice": [1, 2, 4]}}, "B": {"rank": {"low": 1, "high": 8, "int": True}}},
}


def compose(settings: Settings) -> dict[str, Any]:
    return {"settings": dict(settings), "trainer": {}}


def loss(settings: Mapping[str, Any]) -> float:
    """Least for a rate of 0.01 and rank 4."""
    return (math.log10(settings["lr"]) + 2) ** 2 + 0.1 * abs(settings["rank"] - 4)


class Trainings:
    """A runner; it notes what it was asked to run.

    Args:
        outcome: The end of a training, or None for a score of `loss` (less at its end).
    """

    def __init__(self, outcome: Callable[[Settings, bool], Outcome | None] = lambda settings, last: None) -> None:
        self.outcome = outcome
        self.ran: list[tuple[Settings, str | None]] = []

    def __call__(self, assignment: Assignment) -> Outcome:
        config = yaml.safe_load(assignment.config)
        settings = config["settings"]
        self.ran.append((settings, assignment.checkpoint))
        stop = config["trainer"]["callbacks"][-1]["init_args"]
        last = stop["fraction"] == 1.0
        found = self.outcome(settings, last)
        if found is None:
            score = loss(settings) / (2.0 if assignment.checkpoint else 1.0)
            checkpoint = None if last else str(assignment.folder / "stopped.ckpt")
            found = Outcome("ended" if last else "stopped", score, 9.0, checkpoint)
        if found.state != "failed":
            if found.checkpoint is not None:
                Path(found.checkpoint).touch()
            left = Result(state=found.state, step=1, steps=5, score=found.score, checkpoint=found.checkpoint)
            write_result(assignment.folder, left)
        return found


def make(
    folder: Path,
    run: Callable[[Assignment], Outcome],
    *,
    url: str | None = None,
    worker: Worker | None = None,
    said: list[str] | None = None,
    space: Space | None = None,
    **plan: Any,
) -> Search:
    """A search in a folder; everything but its runner is real."""
    folder.mkdir(exist_ok=True)
    url = url or f"sqlite:///{folder / 'study.db'}"
    options = {"trials": 6, "fraction": 0.2, "finish": 0, "recipe": {"lr": 1}, "name": "study"} | plan
    made = Plan(output=folder, space=space or space_of(SPACE, "space"), **options)
    say = (lambda line: None) if said is None else said.append
    return Search(made, open_storage(url), url, compose, run, say, worker or Worker(folder / "workers"), poll=0.02)
