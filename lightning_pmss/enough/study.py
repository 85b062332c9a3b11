"""Train the runs of a study one after the other; finished ones are not repeated, and half ones go on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from lightning_pmss.enough.plan import Plan, Run
from lightning_pmss.messages import one_line
from lightning_pmss.runs.checkpoints import clear, newest
from lightning_pmss.runs.configuration import differences
from lightning_pmss.runs.process import STOPPING, Ended, run_process
from lightning_pmss.runs.record import PROGRESS, RunRecordFile, await_free, read_progress, read_record, write_record
from lightning_pmss.store import read_json
from lightning_pmss.store.disk import atomic_file, clean_folder

STUDY = "study.json"
LOG = "output.log"
CONFIG = "run.yaml"
_WRITTEN_BY = "lightning-pmss enough"
_TOLD = 5  # differences that a refusal lists


def open_study(plan: Plan) -> None:
    """Make the folder of a study, or check that the one that is there is of the same recipe.

    Raises:
        FileExistsError: It has other content, or is of another recipe; the message says what differs.
        OSError: It cannot be made.
        ValueError: Its description is damaged.
    """
    folder, path = plan.output, plan.output / STUDY
    folder.mkdir(parents=True, exist_ok=True)
    clean_folder(folder)
    bound = json.loads(json.dumps(plan.bound(), default=str))
    if path.is_file():
        found = read_json(path, "Remove the folder, or name another one: --output.")
        if not isinstance(found, dict) or found.get("written_by") != _WRITTEN_BY:
            raise FileExistsError(f"{path} is not the description of a study. Name another folder: --output.")
        if lines := differences(found.get("bound"), bound):
            more = f"; and {len(lines) - _TOLD} more" if len(lines) > _TOLD else ""
            raise FileExistsError(
                f"{folder} has runs of another recipe: {'; '.join(map(one_line, lines[:_TOLD]))}{more}. Name another folder"
                " (--output), or remove that one."
            )
        return
    if others := [each.name for each in folder.iterdir() if not each.name.startswith(".")]:
        raise FileExistsError(
            f"{folder} has {one_line(others[0])} and is no study's folder. Name another one: --output."
        )
    with atomic_file(path) as new:
        new.write_text(json.dumps({"written_by": _WRITTEN_BY, "bound": bound}, indent=2), encoding="utf-8")


@dataclass
class Study:
    """The runs of a plan.

    Args:
        plan: What to train.
        program: What starts the command line.
        announce: Takes a line about each run.
        note: Takes a line that replaces the one before it, about the progress of a run.

    Attributes:
        records: The scores of finished runs.
        failures: How the runs ended that did not finish, for people.
    """

    plan: Plan
    program: Sequence[str]
    announce: Callable[[str], object]
    note: Callable[[str], object] = lambda line: None
    records: dict[Run, RunRecordFile] = field(default_factory=dict)
    failures: dict[Run, str] = field(default_factory=dict)
    _spent: float = 0.0
    _worked: float = 0.0

    def train(self, after_each: Callable[[], object]) -> None:
        """Train what is left to train.

        Args:
            after_each: Called after each run.

        Raises:
            ValueError: The first run was refused, as all others would be.
            KeyboardInterrupt: On Ctrl-C, after the run has saved its checkpoint.
        """
        runs = list(self.plan.runs())
        for run in runs:
            if (record := self._finished(run)) is not None:
                self.records[run] = record
                clear(run.folder)
        left = [run for run in runs if run not in self.records]
        if len(left) < len(runs):
            self.announce(f"{len(runs) - len(left)} of {len(runs)} runs are finished already.")
            after_each()
        for number, run in enumerate(left, len(runs) - len(left) + 1):
            self._train(run, f"[{number}/{len(runs)}] {run.name}", left[left.index(run) :])
            after_each()

    def _train(self, run: Run, title: str, left: list[Run]) -> None:
        run.folder.mkdir(exist_ok=True)
        await_free(run.folder)
        clean_folder(run.folder)
        checkpoint = newest([run.folder], self._steps(run))
        begun = read_progress(run.folder) is not None or checkpoint is not None
        how = (
            f": goes on from {checkpoint.name}"
            if checkpoint
            else ": starts anew, no checkpoint to go on from"
            if begun
            else ""
        )
        self.announce(f"{title}{how}")
        config = run.folder / CONFIG
        with atomic_file(config) as new:
            new.write_text(self.plan.config(run, checkpoint), encoding="utf-8")
        started = time.monotonic()
        first: int | None = None

        def meanwhile() -> None:
            nonlocal first
            progress = read_progress(run.folder)
            if progress is None:
                return
            first = progress[0] if first is None else first
            share = (progress[0] - first) / progress[1]
            time_left = self._time_left(left, time.monotonic() - started, share, first / progress[1])
            self.note(f"{title}: step {progress[0]:,} of {progress[1]:,}{time_left}")

        (run.folder / PROGRESS).unlink(missing_ok=True)
        ended = run_process(
            [*self.program, "fit", "--config", str(config)],
            run.folder / LOG,
            meanwhile=meanwhile,
            stopping=lambda: self.announce(STOPPING),
        )
        record = self._finished(run)
        if record is not None and ended.status:  # the next start shall not count it either
            write_record(run.folder, record.model_copy(update={"ended": False}))
        if record is None or ended.status:
            self._fail(run, title, ended)
            return
        self.records[run] = record
        clear(run.folder)
        self._spent += ended.seconds
        self._worked += self.plan.weight(run)
        score = record.scores[-1].metrics.get(self.plan.monitor)
        shown = "not finite" if score is None else f"{score:.4g}"
        rest = self._time_left(left[1:], 0.0, 0.0, 0.0) if left[1:] else ""
        self.announce(f"{title}: {one_line(self.plan.monitor)} {shown} after {spoken(ended.seconds)}{rest}")

    def _time_left(self, left: list[Run], elapsed: float, share: float, before: float) -> str:
        """Say how long the runs that are left will take, at the speed of those of this session."""
        worked, spent = self._worked, self._spent
        if left:
            worked += share * self.plan.weight(left[0])
            spent += elapsed
        rest = sum(map(self.plan.weight, left)) - (share + before) * (self.plan.weight(left[0]) if left else 0.0)
        return f"; about {spoken(rest * spent / worked)} left" if worked else ""

    def _steps(self, run: Run) -> int | None:
        """The optimizer steps that a run has in all, as far as they are known: with equal epochs only the run knows."""
        record = read_record(run.folder)
        if record is not None:
            return record.steps
        return self.plan.steps if self.plan.equal == "steps" else None

    def _finished(self, run: Run) -> RunRecordFile | None:
        record = read_record(run.folder)
        if record is None or not record.finished:
            return None
        if self.plan.equal == "steps" and record.steps != self.plan.steps:
            return None
        return record

    def _fail(self, run: Run, title: str, ended: Ended) -> None:
        refused = ended.refused
        if refused is not None and not self.records:
            raise ValueError(f"run {run.name}: {refused}\nNo other run was started. Its output: {run.folder / LOG}")
        record = read_record(run.folder)
        if ended.status == 0:
            at = record.scores[-1].step if record is not None and record.scores else 0
            reason = f"it ended by itself; its last validation was after step {at}"
        else:
            reason = refused or f"{ended.how}. Its last lines:\n{ended.last_lines}"
        self.failures[run] = reason
        self.announce(f"{title} failed: {reason}\nAll of its output: {run.folder / LOG}")


def scores_of(
    records: dict[Run, RunRecordFile], monitor: str, which: Literal["last", "best"], mode: Literal["min", "max"]
) -> tuple[list[tuple[int, int, float]], list[Run]]:
    """Return (size, seed, score) of each run, and the runs whose score is not finite.

    Args:
        records: The scores of finished runs.
        monitor: Name of the metric.
        which: The one after the last step, or the best of all validations.
        mode: Whether less or more is better.

    Raises:
        ValueError: A run has no such metric.
    """
    found: list[tuple[int, int, float]] = []
    infinite = []
    for run, record in records.items():
        if monitor not in record.scores[-1].metrics:
            known = ", ".join(sorted(record.scores[-1].metrics))
            raise ValueError(
                f"the finished run {run.name} has no score {monitor!r}; it has {known}. Give one of them: --monitor."
            )
        values = [each.metrics.get(monitor) for each in record.scores[-1 if which == "last" else 0 :]]
        finite = [value for value in values if value is not None]
        if not finite:
            infinite.append(run)
            continue
        found.append((run.size, run.seed, min(finite) if mode == "min" else max(finite)))
    return found, infinite


def spoken(seconds: float) -> str:
    """Return a time in words."""
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
