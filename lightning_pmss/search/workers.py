"""Who runs a trial, whether that process still lives, and how a trial gets from one to another."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import sqlalchemy
from filelock import FileLock, Timeout
from optuna.exceptions import OptunaError, UpdateFinishedTrialError
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

HOST, PID, LOCK, BEAT = "host", "pid", "lock", "beat"
INSTEAD_OF, ATTEMPT, SURPLUS = "instead_of", "attempt", "surplus"
FOLDER, MESSAGE = "folder", "message"
MOST_ATTEMPTS = 3
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


class Worker:
    """This process, as the others see it: host, process id, a lock that it holds while it lives, and a beat in its trial.

    Args:
        folder: Where the lock is.
        beat: Seconds between two beats.
        grace: Seconds without a beat after which a worker on another host is dead.
    """

    def __init__(self, folder: Path, beat: float = 20.0, grace: float = 180.0) -> None:
        self.host, self.pid, self.grace = socket.gethostname(), os.getpid(), grace
        folder.mkdir(parents=True, exist_ok=True)
        self._path = (folder / f"{self.host}-{self.pid}-{secrets.token_hex(4)}.lock").absolute()
        self._lock = FileLock(self._path)
        self._lock.acquire()
        self._interval = beat
        self._seen: dict[tuple[str, int], tuple[Any, float]] = {}

    def close(self) -> None:
        """Give up the lock."""
        self._lock.release()
        self._path.unlink(missing_ok=True)

    def sign(self, trial: Trial) -> None:
        """Record in a trial who runs it."""
        for name, value in ((HOST, self.host), (PID, self.pid), (LOCK, str(self._path)), (BEAT, 0)):
            trial.set_user_attr(name, value)

    @contextlib.contextmanager
    def works_on(self, trial: Trial) -> Iterator[None]:
        """Let a signed trial beat until the block ends."""
        done = threading.Event()

        def beat() -> None:
            number = 0
            while not done.wait(self._interval):
                number += 1
                # The database may be busy or away for a while: the next beat will do.
                with contextlib.suppress(OptunaError, sqlalchemy.exc.SQLAlchemyError):
                    trial.set_user_attr(BEAT, number)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def is_dead(self, study: Study, trial: FrozenTrial) -> bool:
        """Whether the process that runs a trial has ended.

        On this host its lock says so. Of another host, or if the lock's file is not here, the beats do: they must have stood
        still for `grace` seconds while this process watched.
        """
        attributes = trial.user_attrs
        lock = attributes.get(LOCK)
        if lock is not None and attributes.get(HOST) == self.host and os.path.exists(lock):
            if lock == str(self._path):
                return False
            try:
                with FileLock(lock, timeout=0):
                    return True
            except Timeout:
                return False
        key, beat, now = (study.study_name, trial.number), attributes.get(BEAT), time.monotonic()
        known, since = self._seen.get(key, (object(), now))
        if known != beat:
            self._seen[key] = (beat, now)
            return False
        return now - since > self.grace


def counted(study: Study) -> list[FrozenTrial]:
    """Return the study's trials without those that another trial repeats, and without surplus ones, by number."""
    trials = study.get_trials(deepcopy=False)
    repeated = {trial.user_attrs.get(INSTEAD_OF) for trial in trials}
    return [trial for trial in trials if trial.number not in repeated and not trial.user_attrs.get(SURPLUS)]


def put_back(study: Study, trial: FrozenTrial, attempts: int) -> bool:
    """End a running trial and let it be run again.

    Args:
        study: Its study.
        trial: As it is in the study.
        attempts: How often it was tried in vain.

    Returns:
        Whether it was put back, and not another process faster.
    """
    try:
        study.tell(trial.number, state=TrialState.FAIL)
    except (ValueError, UpdateFinishedTrialError):  # Optuna's: the trial is not running any more
        return False
    own = (HOST, PID, LOCK, BEAT, FOLDER, MESSAGE)
    kept = {name: value for name, value in trial.user_attrs.items() if name not in own}
    study.enqueue_trial(dict(trial.params), user_attrs=kept | {INSTEAD_OF: trial.number, ATTEMPT: attempts})
    return True


def recover(
    study: Study, worker: Worker, result_of: Callable[[FrozenTrial], bool], announce: Callable[[str], None]
) -> None:
    """Put back the trials of dead workers, except those whose result is on the disk.

    Args:
        study: The study.
        worker: This process.
        result_of: Reports a trial's result to the study, if there is one; returns whether.
        announce: Called with a sentence for each dead worker.
    """
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if not worker.is_dead(study, trial):
            continue
        where = f"process {trial.user_attrs.get(PID, '?')} on {trial.user_attrs.get(HOST, 'an unknown host')}"
        if result_of(trial):
            announce(f"trial {trial.number}: {where} has died after it was done; its result is kept")
            continue
        tried = int(trial.user_attrs.get(ATTEMPT, 0)) + 1
        if tried < MOST_ATTEMPTS:
            if put_back(study, trial, tried):
                announce(f"trial {trial.number}: {where} has died; the trial is run again")
        elif finish(study, trial.number, TrialState.FAIL):
            announce(f"trial {trial.number}: {where} has died, as {tried} workers did with it; it has failed")


def finish(study: Study, number: int, state: TrialState, score: float | None = None) -> bool:
    """Report a trial's end; return False if another process did, which took this one for dead."""
    try:
        study.tell(number, score, state=state)
    except (ValueError, UpdateFinishedTrialError):
        return False
    return True


def set_attributes(trial: Trial, attributes: Mapping[str, Any]) -> bool:
    """Set attributes of a running trial; return False if another process has ended it."""
    try:
        for name, value in attributes.items():
            trial.set_user_attr(name, value)
    except UpdateFinishedTrialError:
        return False
    return True
