"""Set loops and loaders to their place after a resume."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_warn


def restore_loaders(trainer: L.Trainer) -> None:
    """Give the training loaders the states of the checkpoint, if Lightning has not; call it in ``on_train_start``.

    Lightning does so while it makes the loaders. ``estimated_stepping_batches`` in ``configure_optimizers`` makes them before
    the checkpoint is read. A run resumed in the middle of an epoch would then begin that epoch once more.
    """
    loop: Any = trainer.fit_loop
    if loop.restarting and loop._combined_loader_states_to_load and loop._combined_loader is not None:
        loop._load_combined_loader_states()
        iter(loop._data_fetcher)  # the iterator was made before


def warn_about_loaders(trainer: L.Trainer) -> None:
    """Warn that a resumed run is not exact if a loader cannot continue in the middle of an epoch."""
    loop: Any = trainer.fit_loop
    mid_epoch = loop.epoch_loop.batch_progress.current.ready > 0 and not loop.epoch_loop.done
    if not mid_epoch or loop._combined_loader is None:
        return
    foreign = [type(x).__name__ for x in loop._combined_loader.flattened if not hasattr(x, "load_state_dict")]
    if foreign:
        rank_zero_warn(
            f"Resuming in the middle of an epoch: `{foreign[0]}` cannot continue where it stopped, so this epoch will"
            " see other batches than the uninterrupted run. For an exact resume use the loaders of"
            " lightning_pmss.datamodules (or any with `state_dict`/`load_state_dict`), or an end-of-epoch checkpoint."
        )


def count_epoch(trainer: L.Trainer) -> None:
    """Count the epoch that is being trained, if Lightning has not; call it in ``on_train_batch_start``.

    Resumed from the last batch of an epoch, Lightning begins the next one without counting it. A checkpoint of that epoch would
    look like one between two epochs, and a run that goes on from it would begin the epoch once more.
    """
    progress: Any = trainer.fit_loop.epoch_progress
    if progress.current.started == progress.current.processed:
        progress.increment_ready()
        progress.increment_started()


def settle_progress(trainer: L.Trainer) -> None:
    """Set Lightning's counters so that a stopped run resumes at the right place; call it before its checkpoint is made.

    Lightning would continue a validation whose last batch was not finished, and skip the rest of one whose last batch was
    finished. Metrics are in no checkpoint, so all batches of the validation must run again. If the run was stopped between two
    epochs, Lightning would take the batches of the past epoch for those of the next one, and skip them.
    """
    loop: Any = trainer.fit_loop
    if trainer.validating and not trainer.sanity_checking:
        validation = loop.epoch_loop.val_loop.batch_progress
        validation.current.reset()
        validation.total.processed = validation.total.completed
        validation.total.ready = validation.total.started = validation.total.completed + 1
    epoch = loop.epoch_progress
    if epoch.current.started == epoch.current.processed == epoch.current.completed:
        epoch.current.ready, epoch.total.ready = epoch.current.completed, epoch.total.completed
        loop.epoch_loop.batch_progress.reset_on_run()
