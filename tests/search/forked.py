"""Workers that are forks of the test's process."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_pmss.search.records import lines
from lightning_pmss.search.search import Search
from lightning_pmss.search.trial import Assignment, Outcome
from tests.processes import wait_for
from tests.search.fakes import Trainings


def fork(work: Callable[[], Any]) -> int:
    """Run it in a process of its own; returns its id."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(status)
    return child


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def at_once(count: int, work: Callable[[], Any]) -> list[int]:
    """Statuses of processes that begin at the same moment."""
    reading, writing = os.pipe()
    children = [fork(lambda: (os.read(reading, 1), work())) for _ in range(count)]
    os.write(writing, b"." * count)
    return [ended(child) for child in children]


def together(folder: Path) -> Callable[[Assignment], Outcome]:
    """A runner whose first training waits until another process has begun one, too."""
    meeting = folder / "meeting"
    meeting.mkdir(exist_ok=True)

    def training(assignment: Assignment) -> Outcome:
        with (assignment.folder / "ran").open("x"):  # a second run of it would raise
            (meeting / str(os.getpid())).touch()
            wait_for(lambda: len(list(meeting.iterdir())) == 2, what="another worker begins a training")
        return Trainings()(assignment)

    return training


def check_shared(search: Search, trials: int, finish: int) -> None:
    assert search.finals is not None
    found = lines(search.study, search.finals, False)
    assert len(found) == trials
    assert {line.state for line in found} == {"done"}
    assert len({str(line.params) for line in found}) == trials
    assert [line.final is not None for line in found].count(True) == finish
    assert len([trial for trial in search.finals.trials if trial.state.name == "COMPLETE"]) == finish
    assert len({line.where for line in found}) == 2  # both did some
    ran = list((search.plan.output / "trials").rglob("ran"))
    assert len(ran) == trials + finish
