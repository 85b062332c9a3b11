"""The trials of a study as plain records: for the table, the page, the ranks and the winner."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from lightning_pmss.search.space import METHOD, Space
from lightning_pmss.search.workers import FOLDER, HOST, MESSAGE, PID, counted

OF = "of"
"""Attribute of a run to the end: the number of its trial."""
_WORDS = {
    TrialState.COMPLETE: "done",
    TrialState.PRUNED: "diverged",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}


@dataclass(frozen=True)
class Line:
    """One trial.

    Attributes:
        number: Its number in the study.
        state: ``done``, ``diverged``, ``failed``, ``running`` or ``waiting``.
        early: Score at the fraction, or None.
        final: Score at the end of the training, or None.
        final_state: State of the rest of its training; "" if it was not asked for.
        seconds: Time that it took, both parts together.
        params: What Optuna has drawn, by name.
        folder: Its folder.
        message: Why it has no score.
        where: Host and process id.
    """

    number: int
    state: str
    early: float | None
    final: float | None
    final_state: str
    seconds: float | None
    params: Mapping[str, Any]
    folder: str
    message: str
    where: str

    @property
    def method(self) -> str | None:
        """Its method, where several are searched."""
        return self.params.get(METHOD)


def lines(study: Study, finals: Study | None, whole: bool) -> list[Line]:
    """Return the trials of a study by number.

    Args:
        study: The study.
        finals: The study of the trials that were trained to their end; None: there is none.
        whole: Whether the early score is that of the whole training.
    """
    ends = {} if finals is None else finals_by_trial(finals)
    found = []
    for trial in counted(study):
        end = ends.get(trial.number)
        early = trial.value if trial.state is TrialState.COMPLETE else None
        if whole:
            final, final_state = early, _WORDS[trial.state]
        else:
            final = end.value if end is not None and end.state is TrialState.COMPLETE else None
            final_state = "" if end is None else _WORDS[end.state]
        times = [seconds for part in (trial, end) if part is not None and (seconds := _seconds(part)) is not None]
        attributes = trial.user_attrs
        found.append(
            Line(
                number=trial.number,
                state=_WORDS[trial.state],
                early=early,
                final=final,
                final_state=final_state,
                seconds=sum(times) if times else None,
                params=trial.params,
                folder=attributes.get(FOLDER, ""),
                message=attributes.get(MESSAGE, "") or ("" if end is None else end.user_attrs.get(MESSAGE, "")),
                where=f"{attributes[HOST]}:{attributes[PID]}" if HOST in attributes else "",
            )
        )
    return found


def finals_by_trial(finals: Study) -> dict[int, FrozenTrial]:
    """Return the last run of each trial that was to be trained to its end, by the trial's number; a finished one first."""
    found: dict[int, FrozenTrial] = {}
    for run in counted(finals):
        number = run.user_attrs[OF]
        if number not in found or found[number].state is TrialState.FAIL:
            found[number] = run
    return found


def best_first(trials: Iterable[Line], mode: str, *, final: bool = False) -> list[Line]:
    """Return the trials that have a score, the best one first; of equal ones the earlier."""
    sign = 1.0 if mode == "min" else -1.0
    scored = [(score, line) for line in trials if (score := line.final if final else line.early) is not None]
    return [line for _, line in sorted(scored, key=lambda pair: (sign * pair[0], pair[1].number))]


def diverged_late(line: Line) -> bool:
    """Return whether a trial diverged after the fraction, so that at the end it is behind all others."""
    return line.early is not None and line.final_state == "diverged"


def winner(trials: Iterable[Line], mode: str) -> Line | None:
    """Return the best trial: by its score at the end of the training, if any has one, else by the early one."""
    known = list(trials)
    ordered = best_first(known, mode, final=True) or best_first(known, mode)
    return ordered[0] if ordered else None


def mean_seconds(study: Study) -> float | None:
    """Return the mean time of a finished trial."""
    done = [trial for trial in counted(study) if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    times = [seconds for trial in done if (seconds := _seconds(trial)) is not None]
    return statistics.fmean(times) if times else None


def settings_text(space: Space, params: Mapping[str, Any]) -> str:
    """Return what a trial has drawn, in words: ``LoRA, adapter.rank 8, model.optimizer.lr 0.00123``."""
    method = params.get(METHOD)
    words = [] if method is None else [str(method)]
    for name, value in params.items():
        if name != METHOD:
            shown = f"{value:.4g}" if isinstance(value, float) else str(value)
            words.append(f"{name.rpartition(': ')[2]} {shown}")
    return ", ".join(words)


def _seconds(trial: FrozenTrial) -> float | None:
    if trial.datetime_start is None or trial.datetime_complete is None:
        return None
    return (trial.datetime_complete - trial.datetime_start).total_seconds()
