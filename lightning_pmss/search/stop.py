"""
Stop at a fraction
^^^^^^^^^^^^^^^^^^

Ends a trial of a search at a fraction of its training, or as soon as it has diverged.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from lightning_pmss.callbacks.nonfinite import NonFiniteError
from lightning_pmss.search.result import Result, write_result

CHECKPOINT = "stopped.ckpt"


class StopAtFraction(Checkpoint):
    """Stop a fit after a fraction of its optimizer steps, validate, save a checkpoint, and write the score to a file.

    Learning-rate schedules are built for the whole training. A fit that resumes the checkpoint continues as if it had never
    stopped. The fit also ends when a validation gives NaN, infinity or, where less is better, a metric above that of the
    untrained model; the result then is ``diverged``. A NaN or infinite training loss has the same effect.

    It is a `Checkpoint`, since Lightning calls these after all other callbacks.

    Args:
        fraction: Share of the optimizer steps, above 0; 1 trains to the end.
        folder: Where checkpoint and result are written.
        monitor: Name of the metric.
        mode: ``min``: less is better; ``max``: more is.
        untrained: The metric of the untrained model. None: that of the sanity check, if it runs over the whole validation
            set (``num_sanity_val_steps=-1``); otherwise no metric is too bad.

    Raises:
        ValueError: ``fraction`` is not in (0, 1].
        MisconfigurationException: There is no validation, no such metric, or the training has no end.
    """

    def __init__(
        self,
        fraction: float,
        folder: str,
        monitor: str = "val/loss",
        mode: Literal["min", "max"] = "min",
        untrained: float | None = None,
    ) -> None:
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction={fraction!r} is a share of the training; type a number in (0, 1].")
        self.fraction, self.folder, self.monitor, self.mode = fraction, Path(folder), monitor, mode
        self.untrained = untrained
        self._steps = self._stop = 0
        self._score: float | None = None
        self._stopping = self._save_later = False
        self._message = ""

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compute the step at which the fit stops."""
        total = trainer.estimated_stepping_batches
        if not math.isfinite(total):
            raise MisconfigurationException("A search needs trainings with an end: give max_epochs or max_steps.")
        if not trainer.enable_validation:
            raise MisconfigurationException(
                f"A search compares {self.monitor}, and this training has no validation. Give validation data, and"
                " limit_val_batches above 0."
            )
        self._steps = int(total)
        self._stop = max(1, math.ceil(self.fraction * self._steps - 1e-9))  # 0.2 * 60 is 12.000000000000002

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop after the last step of the fraction; the checkpoint is that of a fit which goes on."""
        loop: Any = trainer.fit_loop
        if self._stopping or trainer.global_step < self._stop or loop.epoch_loop._should_accumulate():
            return
        self._stopping = True
        # A fit that goes on would not repeat a validation that is due now, and callbacks shall remember it.
        self._save_later = loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
        if not self._save_later:
            self._save(trainer)
        self._end(trainer)

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Read the metric."""
        score = self._metric(trainer)
        if trainer.sanity_checking:
            if self.untrained is None and trainer.num_sanity_val_steps == math.inf:
                self.untrained = score
            return
        where = f"{self.monitor} at optimizer step {trainer.global_step}"
        if not math.isfinite(score):
            self._message = f"{where} is {score}"
        elif self.mode == "min" and self.untrained is not None and score > self.untrained:
            self._message = f"{where} is {score:.6g}, above the untrained model's {self.untrained:.6g}"
        if self._message:
            rank_zero_info(f"The trial has diverged: {self._message}.")
            self._end(trainer)
            return
        self._score = score
        if self._stopping and self._save_later:
            self._save(trainer)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse a training that ended by itself before it had a score."""
        if self._score is None and not self._message:
            raise MisconfigurationException(
                f"The training ended at optimizer step {trainer.global_step} without a validation, so it has no score."
                " Let it validate earlier, by val_check_interval."
            )

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the result, after adapter and logs are complete."""
        if not self._message and self._score is None:
            return  # nothing was left to train
        checkpoint = self._path() if self._stopping and self._stop < self._steps and not self._message else None
        state: Any = "diverged" if self._message else "ended" if checkpoint is None else "stopped"
        self._write(trainer, state, None if checkpoint is None else str(checkpoint))

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Record a NaN or infinite loss or gradient as a divergence."""
        if isinstance(exception, NonFiniteError):
            self._message = str(exception)
            self._write(trainer, "diverged", None)

    def _end(self, trainer: L.Trainer) -> None:
        """Let Lightning validate now and end the fit, whatever else it waits for."""
        trainer.should_stop = True
        trainer.fit_loop.min_epochs = trainer.fit_loop.epoch_loop.min_steps = None
        trainer.check_val_every_n_epoch = None

    def _path(self) -> Path:
        return (self.folder / CHECKPOINT).absolute()

    def _save(self, trainer: L.Trainer) -> None:
        if self._stop < self._steps:
            trainer.save_checkpoint(self._path())

    def _metric(self, trainer: L.Trainer) -> float:
        """The metric of the first rank, so that all ranks decide alike."""
        if self.monitor not in trainer.callback_metrics:
            known = ", ".join(sorted(trainer.callback_metrics)) or "none"
            raise MisconfigurationException(f"The training logs no {self.monitor!r}. Its metrics are: {known}.")
        return float(trainer.strategy.broadcast(float(trainer.callback_metrics[self.monitor])))

    def _write(self, trainer: L.Trainer, state: Any, checkpoint: str | None) -> None:
        if not trainer.is_global_zero:
            return
        known = self.untrained if self.untrained is not None and math.isfinite(self.untrained) else None
        score = None if state == "diverged" else self._score
        result = Result(
            state=state,
            step=trainer.global_step,
            steps=self._steps,
            score=score,
            untrained=known,
            checkpoint=checkpoint,
            message=self._message,
        )
        write_result(self.folder, result)
