"""The scores of a run, written by a callback inside of it and read by the command that started it."""

from __future__ import annotations

import difflib
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import lightning as L
from filelock import FileLock, Timeout
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from pydantic import Field
from typing_extensions import override

from lightning_pmss.messages import one_line, some
from lightning_pmss.runs.process import stop_with_parent
from lightning_pmss.store import Record, checked, read_json
from lightning_pmss.store.disk import atomic_file

RECORD = "record.json"
PROGRESS = "progress"
_LOCK = ".lock"
_WAIT = 120.0  # seconds for an earlier run in the folder, whose command was killed, to save its checkpoint
_EVERY = 2.0  # seconds between two notes of the progress
_REMEDY = "Remove the run's folder; it then starts anew."
Step = Annotated[int, Field(ge=0, le=2**53)]


class ScoresRecord(Record):
    """The metrics of one validation; null where one is not finite."""

    step: Step
    metrics: dict[str, float | None]


class RunRecordFile(Record):
    """``record.json``: the steps that the run has in all, its validations, and whether it has ended.

    Attributes:
        steps: Optimizer steps of the whole run.
        scores: Its validations.
        ended: Whether adapter and logs are written; null in a file of before, which was not finished without.
    """

    steps: Step
    scores: list[ScoresRecord]
    ended: bool | None = None

    @property
    def finished(self) -> bool:
        """Whether the validation after the last step is there, and what is written behind it."""
        return bool(self.scores) and self.scores[-1].step == self.steps and self.ended is not False


def read_record(folder: Path) -> RunRecordFile | None:
    """Return the scores of the run in a folder, null if there are none yet.

    Raises:
        ValueError: The file is damaged.
    """
    path = folder / RECORD
    return checked(RunRecordFile, read_json(path, _REMEDY), str(path), _REMEDY) if path.is_file() else None


def write_record(folder: Path, record: RunRecordFile) -> None:
    """Write the scores of the run in a folder."""
    with atomic_file(folder / RECORD) as new:
        new.write_text(record.model_dump_json(indent=2))


def read_progress(folder: Path) -> tuple[int, int] | None:
    """Return the optimizer step that the run in a folder is at, and how many it has; null if it is not known."""
    try:
        step, steps = map(int, (folder / PROGRESS).read_text(encoding="ascii").split())
    except (OSError, ValueError):  # not there yet
        return None
    return step, steps


class RunRecord(L.Callback):
    """Validate after the last step whatever the recipe says, and write the scores of every validation to a folder.

    Needs ``check_val_every_n_epoch=None`` and no ``min_epochs`` and ``min_steps``. A run that another command has started is
    stopped, and saves its checkpoint, when that command ends. Checkpoints contain the scores.

    Args:
        folder: Folder of the run, which one process may use at a time.
        monitor: A metric that validation must log; with a sanity check its absence shows before the training.

    Raises:
        ValueError: ``monitor`` is not logged, or another process uses the folder.
    """

    def __init__(self, folder: str | Path, monitor: str | None = None) -> None:
        self.folder = Path(folder)
        self.monitor = monitor
        self.scores: list[ScoresRecord] = []
        self.steps = 0
        self._lock: FileLock | None = None
        self._noted = 0.0

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Follow the command that started this process, and take the folder."""
        if not trainer.is_global_zero or self._lock is not None:
            return
        stop_with_parent()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(self.folder)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look up the last step, and write it down: a run that is stopped before its first validation needs it."""
        last = trainer.estimated_stepping_batches
        if not math.isfinite(last):
            raise ValueError("this run has no end; give --trainer.max_steps or --trainer.max_epochs.")
        self.steps = int(last)
        self._write(trainer)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ask for a validation after the last step; it would be left out where no interval ends there."""
        if trainer.global_step >= self.steps:
            trainer.should_stop = True
        now = time.monotonic()
        if trainer.is_global_zero and now - self._noted >= _EVERY:
            self._noted = now
            _note(self.folder / PROGRESS, f"{trainer.global_step} {self.steps}")

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the metrics; in the sanity check refuse a monitor that is not among them."""
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if self.monitor is not None and self.monitor not in metrics:
            close = difflib.get_close_matches(self.monitor, metrics, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            found = some(list(metrics), 12) if metrics else "nothing"
            raise ValueError(f"{one_line(self.monitor)!r} is not logged in validation; logged is {found}.{hint}")
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self.scores = [each for each in self.scores if each.step < trainer.global_step]
        self.scores.append(ScoresRecord(step=trainer.global_step, metrics=finite))
        self._write(trainer)
        if trainer.global_step >= self.steps:
            rank_zero_info(f"Scores of this run: {self.folder / RECORD}")

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the end, after adapter and logs are complete."""
        if self.steps:  # else nothing was left to train
            self._write(trainer, ended=True)

    def _write(self, trainer: L.Trainer, *, ended: bool = False) -> None:
        if trainer.is_global_zero:
            write_record(self.folder, RunRecordFile(steps=self.steps, scores=self.scores, ended=ended))

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"scores": [each.model_dump() for each in self.scores]}

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.scores = [ScoresRecord(**each) for each in state_dict["scores"]]


def await_free(folder: Path) -> None:
    """Wait until no process trains in a run's folder: one whose command was killed may still be saving its checkpoint.

    Raises:
        ValueError: One does so for long.
    """
    _locked(folder).release()


def _locked(folder: Path) -> FileLock:
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(timeout=_WAIT)
    except Timeout:
        raise ValueError(
            f"another process has been training in {folder} for {_WAIT:.0f} s; wait for its end, or stop it."
        ) from None
    return lock


def _note(path: Path, text: str) -> None:
    """Write what need not outlive a power cut."""
    new = path.with_suffix(".new")
    new.write_text(text, encoding="ascii")
    os.replace(new, path)
