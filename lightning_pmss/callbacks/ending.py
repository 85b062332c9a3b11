"""Write the results of a fit at its end, when it is stopped, and when nothing was left to train."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_pmss.callbacks.averaging import (
    average_in_place,
    average_last_step,
    end_exchange,
    set_last_averages,
)
from lightning_pmss.callbacks.facts import figures
from lightning_pmss.callbacks.frozen import FrozenWatch
from lightning_pmss.callbacks.places import STOPPED_ADAPTER, STOPPED_CHECKPOINT, checkpoint_folders, somewhere
from lightning_pmss.callbacks.results import beside, merge_beside, write_adapter, write_merged_model
from lightning_pmss.callbacks.stopping import GracefulStop
from lightning_pmss.checkpoints.plugin import is_checkpoint, local_path
from lightning_pmss.distributed.ranks import together
from lightning_pmss.files.base import base_of
from lightning_pmss.layers.parts import clean_name, is_sharded
from lightning_pmss.messages import some
from lightning_pmss.modules.resuming import settle_progress
from lightning_pmss.store.atomic import remove_folder
from lightning_pmss.store.disk import remove
from lightning_pmss.store.kinds import ADAPTER


class Ending:
    """Write the results of one fit, once.

    Args:
        trainer: Trainer of the fit.
        module: The converted LightningModule.
        folder: Folder of adapter and merged model.
        merge: Option ``merge_on_save`` of the callback.
        stop: Handler of signals.
        earlier: Metrics from the checkpoint that the run resumed.
        label: Name of the method, for messages.

    Attributes:
        trained: Whether this fit has completed an optimizer step.
        torn: Whether an optimizer step is running, so that only some tensors may be updated.
        watch: Detects changes of the frozen weights; None under sharding engines.
    """

    def __init__(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        folder: Path,
        *,
        merge: str | None,
        stop: GracefulStop,
        earlier: Mapping[str, float],
        label: str,
    ) -> None:
        self.label = label
        self.trainer, self.module, self.folder, self.merge, self.stop = trainer, module, folder, merge, stop
        self.earlier = earlier
        self.trained = self.torn = False
        self.watch: FrozenWatch | None = None
        self._adapter: Path | None = None  # where the adapter was written
        self._written: dict[str, Tensor] = {}  # trained tensors as in the results
        self._done = False
        self._found = (folder / "adapter").exists()  # an earlier run's; only a completed training replaces it
        self._teardown = BeforeTeardown(trainer.strategy, self._without_training)

    def disarm(self) -> None:
        """Write nothing from here on."""
        self._done = True
        self._teardown.remove()

    def begin_step(self) -> None:
        """Mark the start of an optimizer step, during which tensors of two steps may be mixed."""
        self.torn = True

    def look_for_late_changes(self) -> None:
        """Warn if a hook after ``on_train_end`` changed trained tensors, which the results then lack."""
        now = _trained_values(self.module) if self._written else {}
        changed = [
            n for n, value in self._written.items() if n in now and not torch.equal(now[n].to(value.dtype), value)
        ]
        if changed:
            rank_zero_warn(
                f"{self.label}: {some(changed)} were changed after the results of this fit were written, so adapter and merged"
                " model contain the earlier values. Change them in `on_train_end`, or call `save_adapter` afterwards."
            )

    def figures(self) -> dict[str, float]:
        """Current metrics for the model card, including those from the resumed checkpoint."""
        return {**self.earlier, **figures(self.trainer)}

    def make_up_for_merged(self) -> None:
        """Write the merged model beside the resumed checkpoint, if a kill prevented that."""
        if self.merge != "checkpoint" or self.trainer.ckpt_path is None:
            return
        checkpoint = local_path(self.trainer.ckpt_path)
        if checkpoint is None or checkpoint.parent not in checkpoint_folders(self.trainer):
            return  # of another run
        if self.trainer.strategy.broadcast(not beside(checkpoint).exists()):
            with average_in_place(self.trainer, self.module):
                merge_beside(self.trainer, self.module, checkpoint)

    # -- at the end ---------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Write adapter and merged model; call it on every rank before teardown."""
        self._done = True
        trainer, module = self.trainer, self.module
        if self.watch is not None:
            self.watch.keep_fingerprints()
            self._written = _trained_values(module)
        self._adapter, _ = somewhere(
            trainer, self.folder / "adapter", lambda place: write_adapter(trainer, module, place, earlier=self.earlier)
        )
        rank_zero_info(f"{self.label}: adapter in {self._adapter}")
        adapter = self._adapter
        together(trainer.strategy, partial(self._refuse_another_base, adapter))
        if self.merge is not None:
            try:
                merged, report = somewhere(
                    trainer, self.folder / "merged", lambda place: write_merged_model(trainer, module, adapter, place)
                )
            except (OSError, ValueError) as error:
                error.add_note(f"The adapter is complete: {self._adapter}. {self._how_to_merge(self._adapter)}")
                raise
            rank_zero_info(f"{self.label}: merged model in {merged}\n{report}")
        if trainer.is_global_zero:
            self._remove_of_stopped()
        trainer.strategy.barrier("PMSS.results")

    def _refuse_another_base(self, adapter: Path) -> None:
        if self.watch is not None and (other := self.watch.other_base(adapter)) is not None:
            raise RuntimeError(other)

    def _remove_of_stopped(self) -> None:
        """Remove the checkpoint and adapter that an interruption of this run left."""
        if is_checkpoint(checkpoint := self._stopped_checkpoint()):
            remove(checkpoint)
        adapter = self.folder / STOPPED_ADAPTER
        if adapter.is_dir():
            try:
                remove_folder(adapter, ADAPTER)
            except OSError as error:
                rank_zero_warn(f"{adapter} stays, although the training has ended: {error}")

    def _without_training(self) -> None:
        """Write the results before teardown if Lightning's loops had nothing to do, which skips ``on_train_end``."""
        trainer = self.trainer
        if self._done or trainer.state.fn is not TrainerFn.FITTING or trainer.state.status is not TrainerStatus.RUNNING:
            return
        if trainer.ckpt_path is None:
            self._done = True
            rank_zero_warn(f"Nothing was trained, so that no adapter is written: {why_nothing_was_trained(trainer)}.")
            return
        rank_zero_info(f"{self.label}: nothing was left to train after {trainer.ckpt_path}; its results are written.")
        self.make_up_for_merged()
        set_last_averages(trainer, self.module)
        self.finish()

    # -- stopped ------------------------------------------------------------------------------------------------------

    def stopped(self, exception: BaseException) -> None:
        """Save a checkpoint and the adapter, as far as the ranks are in step, and report their paths."""
        self.stop.release()
        self.stop.mark(exception, self.trainer)
        apart = end_exchange(self.trainer, self.module)
        if self._done and self._adapter is not None:
            rank_zero_info(
                f"{self.label}: stopped while results were written. The adapter is complete: {self._adapter}."
            )
            return
        if not self.trained:
            if isinstance(exception, KeyboardInterrupt | SIGTERMException):
                rank_zero_info(f"{self.label}: stopped before the first optimizer step was done; nothing is written.")
            return
        self._done = True
        self._teardown.remove()
        if self.watch is not None:
            self.watch.keep_fingerprints()
        by = self._by(exception)
        in_step = self.trainer.world_size == 1 or self.stop.agreed
        rank_zero_info(f"{self.label}: stopped by {by} after optimizer step {self.trainer.global_step}.")
        if self.torn or not apart:
            rank_zero_info(
                "It came in the middle of an optimizer step, when tensors of two steps are mixed: not saved."
                if apart
                else "It came while a validation exchanged average and weights, when the two are mixed: not saved."
            )
            self._say_last_checkpoint()
            return
        try:
            average_last_step(self.trainer, self.module)
            if in_step:
                settle_progress(self.trainer)
                checkpoint, _ = somewhere(self.trainer, self._stopped_checkpoint(), self.trainer.save_checkpoint)
                rank_zero_info(f"{self.label}: checkpoint {checkpoint}. To go on: --ckpt_path {checkpoint}")
            else:
                rank_zero_info("No checkpoint is made: the other processes cannot be asked for their part.")
                self._say_last_checkpoint()
            if in_step or not is_sharded(self.module):
                place = self.folder / (STOPPED_ADAPTER if self._found else "adapter")
                with average_in_place(self.trainer, self.module):
                    adapter = self._write_stopped_adapter(place, by, in_step=in_step)
                rank_zero_info(f"{self.label}: adapter {adapter}. {self._how_to_merge(adapter)}")
        except Exception as error:  # it must not hide what stopped the training
            rank_zero_warn(f"Not everything could be saved: {type(error).__name__}: {error}")

    def _write_stopped_adapter(self, place: Path, by: str, *, in_step: bool) -> Path:
        def write(folder: Path) -> None:
            write_adapter(self.trainer, self.module, folder, earlier=self.earlier, stopped=by)

        if not in_step:
            write(place)
            return place
        return somewhere(self.trainer, place, write)[0]

    def _by(self, exception: BaseException) -> str:
        if isinstance(exception, SIGTERMException):
            return self.stop.name if self.stop.agreed else "SIGTERM"
        return "Ctrl-C" if isinstance(exception, KeyboardInterrupt) else f"{type(exception).__name__}"

    def _stopped_checkpoint(self) -> Path:
        return next(iter(checkpoint_folders(self.trainer)), self.folder) / STOPPED_CHECKPOINT

    def _say_last_checkpoint(self) -> None:
        for callback in self.trainer.checkpoint_callbacks:
            if path := getattr(callback, "last_model_path", "") or getattr(callback, "best_model_path", ""):
                rank_zero_info(f"{self.label}: the last checkpoint is {path}.")

    def _how_to_merge(self, adapter: Path) -> str:
        base = base_of(self.module)
        given = base.folder or base.name or "BASE"
        return f"For a merged model type: python -m lightning_pmss merge --base {given} --adapter {adapter} --output MERGED"


def _trained_values(module: L.LightningModule) -> dict[str, Tensor]:
    return {clean_name(n): p.detach().cpu().clone() for n, p in module.named_parameters() if p.requires_grad}


class BeforeTeardown:
    """Call an action on every rank before a strategy's teardown, the last moment for collectives."""

    def __init__(self, strategy: Strategy, action: Callable[[], None]) -> None:
        self.strategy, self.action, self._inner = strategy, action, strategy.teardown
        strategy.teardown = self._call  # type: ignore[method-assign]

    def remove(self) -> None:
        """Restore the strategy's ``teardown``."""
        if self.strategy.__dict__.get("teardown") == self._call:
            del self.strategy.teardown

    def _call(self) -> None:
        self.remove()
        self.action()
        self._inner()


def why_nothing_was_trained(trainer: L.Trainer) -> str:
    """Reason why Lightning's loops had nothing to do."""
    loop: Any = trainer.fit_loop
    if trainer.limit_train_batches == 0:
        return "limit_train_batches=0"
    if loop.max_batches == 0:
        return "the training loader has no batch (no examples, or fewer than batch_size with drop_last)"
    if trainer.max_steps == 0:
        return "max_steps=0"
    if trainer.max_epochs == 0:
        return "max_epochs=0"
    return f"this Trainer has done its max_epochs={trainer.max_epochs}, max_steps={trainer.max_steps} in an earlier fit"
