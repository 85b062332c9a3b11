"""The search: workers take trials from a study, run them to the fraction, and train the best ones to their end."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import RandomSampler
from optuna.storages import RDBStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from lightning_pmss.runs.checkpoints import clear, newest
from lightning_pmss.search.config import trial_config
from lightning_pmss.search.records import OF, Line, best_first, finals_by_trial, lines, mean_seconds, settings_text
from lightning_pmss.search.result import read_result
from lightning_pmss.search.sampler import sampler
from lightning_pmss.search.space import Settings, Space, space_of
from lightning_pmss.search.storage import BOUND, claims, direction, load_study, open_storage, open_study
from lightning_pmss.search.trial import Assignment, Outcome, Runner
from lightning_pmss.search.workers import (
    ATTEMPT,
    FINISHED,
    FOLDER,
    HOST,
    INSTEAD_OF,
    MESSAGE,
    SURPLUS,
    Worker,
    counted,
    finish,
    put_back,
    recover,
    set_attributes,
)

UNTRAINED = "untrained"
_SAME_FAILURES = 3  # in a row from the start: the recipe is at fault, not the settings
_STATES = {
    "stopped": TrialState.COMPLETE,
    "ended": TrialState.COMPLETE,
    "diverged": TrialState.PRUNED,  # Optuna ranks it behind all that have a score
    "failed": TrialState.FAIL,
}


def finals_name(name: str) -> str:
    """Return the name of the study of the final runs."""
    return f"{name}/finish"


class SearchError(ValueError):
    """The search cannot go on."""


@dataclass
class Plan:
    """What is searched.

    Attributes:
        name: Of the study.
        output: Folder of the trials.
        space: What varies.
        recipe: Whole configuration of ``fit`` without the settings, plain data.
        trials: Number of trials in the study, those of other workers included.
        fraction: Share of the training at which a trial stops.
        finish: How many of the best are trained to their end.
        monitor: The metric.
        mode: ``min`` or ``max``.
        sampler: ``tpe`` or ``random``.
        seed: Of the sampler.
    """

    name: str
    output: Path
    space: Space
    recipe: Mapping[str, Any]
    trials: int
    fraction: float
    finish: int
    monitor: str = "val/loss"
    mode: str = "min"
    sampler: str = "tpe"
    seed: int = 0

    def bound(self) -> dict[str, Any]:
        """Return what all trials of the study share."""
        names = ("fraction", "monitor", "mode", "sampler", "seed")
        return {"recipe": self.recipe, "space": self.space.text} | {name: getattr(self, name) for name in names}


@dataclass
class Search:
    """One worker of a search.

    Args:
        plan: What is searched.
        storage: The database.
        url: Its URL.
        compose: Makes the whole configuration of ``fit`` from settings.
        run: Runs a training.
        say: Called with a line for people.
        worker: This process, for the others.
        poll: Seconds between two looks at the trials of other workers.
    """

    plan: Plan
    storage: RDBStorage
    url: str
    compose: Callable[[Settings], Mapping[str, Any]]
    run: Runner
    say: Callable[[str], None]
    worker: Worker
    poll: float = 2.0
    study: Study = field(init=False)
    finals: Study | None = field(init=False, default=None)
    _awaited: str = field(init=False, default="")
    _failures: list[tuple[int, str]] | None = field(init=False, default_factory=list)  # None: one was no failure

    def __post_init__(self) -> None:
        """Open the study.

        Raises:
            ValueError: It is bound to something else.
        """
        plan = self.plan
        self.study, _ = open_study(self.storage, plan.name, plan.mode, plan.bound())
        self.study.sampler = sampler(plan.sampler, plan.space, plan.seed)
        self._claims = claims(self.url, plan.output)

    def lines(self) -> list[Line]:
        """Return the trials."""
        return lines(self.study, self.finals, self.plan.fraction == 1)

    @property
    def untrained(self) -> float | None:
        """The metric of the untrained model, once a trial has measured it."""
        return self.study.user_attrs.get(UNTRAINED)

    # -- trials up to the fraction --------------------------------------------------------------------------------------

    def search(self) -> None:
        """Run trials until the study has as many as were asked for, and those of other workers have ended.

        Raises:
            SearchError: The first trials have all failed in the same way.
        """
        while True:
            with self._claims:
                recover(self.study, self.worker, self._result_of, self.say)
                trial = self._claim(self.plan.trials)
            if trial is not None:
                self._early(trial)
            elif not self._wait(self.study):
                return

    def _claim(self, limit: int) -> Trial | None:
        """Take a trial that waits, or a new one if the study has fewer than asked for."""
        known = counted(self.study)
        if len(known) >= limit and not any(trial.state is TrialState.WAITING for trial in known):
            return None
        trial = self.study.ask()
        known = counted(self.study)
        place = [other.number for other in known].index(trial.number)
        if place >= limit and INSTEAD_OF not in trial.user_attrs:  # a worker on another host was faster
            trial.set_user_attr(SURPLUS, True)
            finish(self.study, trial.number, TrialState.FAIL)
            return None
        self.worker.sign(trial)
        return trial

    def _early(self, trial: Trial) -> None:
        plan = self.plan
        untrained = self.untrained

        def prepare() -> Assignment:
            settings = plan.space.draw(trial)
            folder = self._folder(trial, plan.output / "trials" / f"{trial.number:04d}")
            config = trial_config(self.compose(settings), folder, plan.fraction, plan.monitor, plan.mode, untrained)
            return Assignment(folder, config)

        label = f"trial {trial.number}"
        outcome = self._work(self.study, trial, label, prepare)
        if untrained is None and outcome.untrained is not None:
            self.study.set_user_attr(UNTRAINED, outcome.untrained)
        self._report(self.study, trial, outcome, plan.trials, label)
        self._refuse_same_failures(trial.number, outcome)

    def _refuse_same_failures(self, number: int, outcome: Outcome) -> None:
        """Stop if this worker's first trials failed alike, and no trial is done; the next start runs them again."""
        if self._failures is None:
            return
        if any(trial.state in (TrialState.COMPLETE, TrialState.PRUNED) for trial in counted(self.study)):
            self._failures = None  # the recipe is not at fault
            return
        self._failures.append((number, re.sub(r"\d+", "N", outcome.message)))
        if outcome.state != "failed" or len({kind for _, kind in self._failures}) > 1:
            self._failures = None
        elif len(self._failures) == _SAME_FAILURES:
            trials = self.study.get_trials(deepcopy=False)
            for failed, _ in self._failures:
                self.study.enqueue_trial(dict(trials[failed].params), user_attrs={INSTEAD_OF: failed})
            raise SearchError(
                f"the first {_SAME_FAILURES} trials failed in the same way, so the search stops: {outcome.message}\n"
                f"Their output is in {self.plan.output / 'trials'}. Remove the cause, and the same command runs them again."
            )

    # -- the rest of the best trials -------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Train the best trials to their end; those that are trained already are left alone."""
        plan = self.plan
        name = finals_name(plan.name)
        if plan.fraction == 1 or plan.finish < 1:
            known = {study.study_name for study in optuna.get_all_study_summaries(self.storage)}
            self.finals = optuna.load_study(storage=self.storage, study_name=name) if name in known else None
            return
        self.finals = optuna.create_study(
            storage=self.storage,
            study_name=name,
            direction=direction(plan.mode),
            load_if_exists=True,
            sampler=RandomSampler(),
        )
        chosen = best_first(self.lines(), plan.mode)[: plan.finish]
        with self._claims:
            ends = finals_by_trial(self.finals)
            for line in chosen:
                if line.number not in ends or ends[line.number].state is TrialState.FAIL:
                    self.finals.enqueue_trial({}, user_attrs={OF: line.number})
        while True:
            with self._claims:
                recover(self.finals, self.worker, self._result_of, self.say)
                trial = self._claim_final()
            if trial is not None:
                self._final(trial, len(chosen))
            elif not self._wait(self.finals):
                return

    def _claim_final(self) -> Trial | None:
        assert self.finals is not None
        while any(trial.state is TrialState.WAITING for trial in counted(self.finals)):
            trial = self.finals.ask()
            if OF not in trial.user_attrs:  # the last one that waited was taken by a worker on another host
                self._drop(trial)
                continue
            first = finals_by_trial(self.finals)[trial.user_attrs[OF]]
            if first.number == trial.number:
                self.worker.sign(trial)
                return trial
            self._drop(trial)  # asked for by two workers
        return None

    def _drop(self, trial: Trial) -> None:
        assert self.finals is not None
        trial.set_user_attr(SURPLUS, True)
        finish(self.finals, trial.number, TrialState.FAIL)

    def _final(self, trial: Trial, count: int) -> None:
        assert self.finals is not None
        number = trial.user_attrs[OF]
        early = next(known for known in counted(self.study) if known.number == number)
        folder = Path(early.user_attrs[FOLDER])
        result = read_result(folder)
        label = f"trial {number}, to its end"
        if result is None or result.checkpoint is not None and not Path(result.checkpoint).exists():
            host = early.user_attrs.get(HOST, "another host")
            message = f"its files in {folder} cannot be read here; start the same command on {host}"
            with self.worker.works_on(trial):
                self._report(self.finals, trial, Outcome("failed", message=message), count, label)
            return
        if result.checkpoint is None:  # it ended before the fraction by itself
            with self.worker.works_on(trial):
                self._report(self.finals, trial, Outcome("ended", result.score), count, label)
            return

        def prepare() -> Assignment:
            halves = sorted(folder.glob("final-*"))  # what killed and interrupted runs have left
            place = self._folder(trial, folder / f"final-{trial.number}")
            plan, recipe = self.plan, self.compose(self.plan.space.settings(early.params))
            config = trial_config(recipe, place, 1.0, plan.monitor, plan.mode, self.untrained, result.steps)
            return Assignment(place, config, str(newest(halves, result.steps) or result.checkpoint))

        outcome = self._work(self.finals, trial, label, prepare)
        if outcome.state != "failed":
            for place in folder.glob("final-*"):
                clear(place)
        self._report(self.finals, trial, outcome, count, label)

    # -- both ------------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _put_back_if_stopped(self, study: Study, trial: Trial) -> Iterator[None]:
        try:
            yield
        except BaseException:
            known = study.get_trials(deepcopy=False)[trial.number]
            if put_back(study, known, int(known.user_attrs.get(ATTEMPT, 0))):
                self.say(f"trial {known.user_attrs.get(OF, trial.number)} is put back; the same command continues")
            raise

    def _work(self, study: Study, trial: Trial, label: str, prepare: Callable[[], Assignment]) -> Outcome:
        with self._put_back_if_stopped(study, trial), self.worker.works_on(trial):
            assignment = prepare()
            drawn = settings_text(self.plan.space, trial.params)
            self.say(f"{label} begins in {assignment.folder}{': ' + drawn if drawn else ''}")
            return self.run(assignment)

    def _folder(self, trial: Trial, folder: Path) -> Path:
        """Make the folder of a training and record it.

        Raises:
            FileExistsError: It is there already.
        """
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            raise FileExistsError(
                f"{folder} exists, and is not of this study. Type another --output, or move the folder away."
            ) from None
        trial.set_user_attr(FOLDER, str(folder.absolute()))
        return folder

    def _report(self, study: Study, trial: Trial, outcome: Outcome, count: int, label: str) -> None:
        """Report a trial's end to the study and to people."""
        state = _STATES[outcome.state]
        attributes = {MESSAGE: outcome.message} if outcome.message else {}
        if not set_attributes(trial, attributes) or not finish(study, trial.number, state, outcome.score):
            self.say(f"{label}: another worker took this one for dead and has the trial now; its result is left out")
            return
        words = {TrialState.PRUNED: "diverged", TrialState.FAIL: "failed"}
        said = f"{self.plan.monitor} {outcome.score:.6g}" if outcome.score is not None else words[state]
        said += f" ({outcome.message})" if outcome.message else ""
        self.say(f"{label}: {said}{self._progress(study, count)}")
        for line in outcome.lines:
            self.say(f"    {line}")

    def _progress(self, study: Study, count: int) -> str:
        known = counted(study)
        done = sum(trial.state in FINISHED for trial in known)
        others = sum(trial.state is TrialState.RUNNING for trial in known)
        mean = mean_seconds(study)
        left = max(0, count - done)
        text = f" [{done} of {max(count, done)}"
        if left and mean is not None:
            text += f", about {_duration(mean * left / (1 + others))} left"
        return f"{text}]"

    def _wait(self, study: Study) -> bool:
        """Wait a moment for the trials of other workers; return False if there are none."""
        open_ones = [t for t in counted(study) if t.state in (TrialState.RUNNING, TrialState.WAITING)]
        if not open_ones:
            return False
        names = ", ".join(f"{t.user_attrs.get(OF, t.number)} (on {t.user_attrs.get(HOST, '?')})" for t in open_ones)
        if names != self._awaited:
            self.say(f"waits for trials of other workers: {names}")
            self._awaited = names
        time.sleep(self.poll)
        return True

    def _result_of(self, trial: FrozenTrial) -> bool:
        """Report the result that a dead worker's trial has left."""
        study = self.study if OF not in trial.user_attrs else self.finals
        folder = trial.user_attrs.get(FOLDER)
        result = None if folder is None or study is None else read_result(Path(folder))
        if result is None or study is None:
            return False
        return finish(study, trial.number, _STATES[result.state], result.score)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def read_search(url: str, name: str) -> tuple[list[Line], Space, dict[str, Any]]:
    """Read a study: its trials, its space, and what they share.

    Raises:
        ValueError: The database cannot be used, or does not have the study.
    """
    storage = open_storage(url)
    study = load_study(storage, name)
    bound = study.user_attrs.get(BOUND)
    if bound is None:
        raise ValueError(f"the study {name!r} is not one of tune.")
    known = {summary.study_name for summary in optuna.get_all_study_summaries(storage)}
    finals = load_study(storage, finals_name(name)) if finals_name(name) in known else None
    return lines(study, finals, bound["fraction"] == 1), space_of(bound["space"], name), bound
