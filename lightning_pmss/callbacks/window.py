"""An optimizer step that is over several batches, in a checkpoint that is made between two of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_pmss.layers.parts import clean_name
from lightning_pmss.modules.token_weighted import TokenWeighted, gradients_so_far


class AccumulatedGradients:
    """Keeps the gradients so far in checkpoints, and gives them back.

    Lightning forgets them: a run that goes on from such a checkpoint would make its first step of the batches that are left.
    `TokenWeighted` modules do it for themselves.

    Attributes:
        in_batch: A backward pass has begun, and its batch is not at its end: gradients may be of a part of it.
    """

    def __init__(self) -> None:
        self.in_batch = False
        self._open = False  # batches were trained on since the last optimizer step
        self._stored: Mapping[str, Any] | None = None

    def after_batch(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """See whether the step goes on."""
        self.in_batch = False
        mine = module.automatic_optimization and not isinstance(module, TokenWeighted)
        self._open = mine and trainer.fit_loop.epoch_loop._should_accumulate()

    def state(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, Any]:
        """What a checkpoint needs; a collective under DDP."""
        if not self._open:
            return {}
        return {"gradients": {} if self.in_batch else gradients_so_far(trainer, module)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take them back; they are given to the parameters before the first batch."""
        self._stored = state.get("gradients")

    def give_back(self, module: L.LightningModule) -> None:
        """Call it in ``on_train_start``, when Lightning has cleared the gradients."""
        stored, self._stored = self._stored, None
        self.in_batch = self._open = False
        if stored is None:
            return
        if not stored:
            rank_zero_warn(
                "Resuming inside an optimizer step whose first gradients are not in the checkpoint: this step is made of the"
                " batches that are left. Make checkpoints between steps (val_check_interval, every_n_train_steps)."
            )
        parameters = {clean_name(name): parameter for name, parameter in module.named_parameters()}
        for name, gradient in stored.items():
            where = parameters[clean_name(name)]
            value: Tensor = gradient.to(where.device, where.dtype)
            where.grad = value
        self._open = True
