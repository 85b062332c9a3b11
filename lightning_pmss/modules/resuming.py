"""The place of loops and loaders, after a resume."""

from __future__ import annotations

from typing import Any

import lightning as L


def restore_loaders(trainer: L.Trainer) -> None:
    """Give the training loaders the states of the checkpoint, if Lightning has not; call it in ``on_train_start``.

    Lightning does so while it makes the loaders, which ``estimated_stepping_batches`` in ``configure_optimizers`` lets it do
    before it has read the checkpoint. A run that is resumed in the middle of an epoch would begin that epoch once more.
    """
    loop: Any = trainer.fit_loop
    if loop.restarting and loop._combined_loader_states_to_load and loop._combined_loader is not None:
        loop._load_combined_loader_states()
        iter(loop._data_fetcher)  # the iterator was made before


def count_epoch(trainer: L.Trainer) -> None:
    """Count the epoch that is being trained, if Lightning has not; call it in ``on_train_batch_start``.

    Resumed from the last batch of an epoch, Lightning begins the next one without counting it. A checkpoint of that epoch would
    look like one between two epochs, and a run that goes on from it would begin the epoch once more.
    """
    progress: Any = trainer.fit_loop.epoch_progress
    if progress.current.started == progress.current.processed:
        progress.increment_ready()
        progress.increment_started()
