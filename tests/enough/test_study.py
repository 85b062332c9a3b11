"""The time that is left, and the work that it is computed from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_pmss.enough.plan import Plan
from lightning_pmss.enough.study import Study, spoken


def plan(equal: Any, **more: Any) -> Plan:
    options: dict[str, Any] = {
        "recipe": {"data": {"init_args": {"seed": 2}}}, "sizes": (10, 40), "seeds": 2, "equal": equal, "steps": 30, "epochs": 2,
        "steps_per_example": 0.5, "kind": None, "validations": 1, "monitor": "val/loss", "data": {}, "output": Path("study"),
    }  # fmt: skip
    return Plan(**options | more)


def test_runs_come_seed_by_seed() -> None:
    names = [run.folder.name for run in plan("steps").runs()]
    assert names == ["n10-seed2", "n40-seed2", "n10-seed3", "n40-seed3"]


def test_how_subsets_are_drawn() -> None:
    assert plan("steps").drawn == "subsets are drawn at random"
    assert plan("steps", kind="kind").drawn == "subsets keep the shares of the kinds of examples"
    assert plan("steps", kind="topic").drawn == "subsets keep the shares of the column topic"


def test_time_left() -> None:
    """As many seconds for each optimizer step as the finished runs took."""
    for equal, weights in (("steps", [30, 30, 30, 30]), ("epochs", [10, 40, 10, 40])):
        study = Study(plan(equal), (), print)
        runs = list(study.plan.runs())
        assert [study.plan.weight(run) for run in runs] == weights
        assert study._time_left(runs, 60.0, 0.0, 0.0) == ""  # before the first step nothing is known
        # A quarter of the first run is done, half of it by an earlier process.
        rest = sum(weights) - 0.75 * weights[0]
        assert study._time_left(runs, 100.0, 0.25, 0.5) == f"; about {spoken(rest * 400 / weights[0])} left"
        study._spent, study._worked = 100.0 * weights[0], float(weights[0])
        assert study._time_left(runs[1:], 0.0, 0.0, 0.0) == f"; about {spoken(100.0 * sum(weights[1:]))} left"


def test_times_in_words() -> None:
    assert [spoken(seconds) for seconds in (9.6, 59, 61, 3599, 3700)] == [
        "10 s",
        "59 s",
        "1 min",
        "1 h 0 min",
        "1 h 2 min",
    ]
