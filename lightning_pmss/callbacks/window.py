"""Save accumulated gradients in a checkpoint that is made inside an optimizer step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_pmss.layers.parts import clean_name
from lightning_pmss.modules.token_weighted import TokenWeighted, gradients_so_far


class AccumulatedGradients:
    """Save accumulated gradients in checkpoints, and restore them.

    Lightning drops them, so the first step of a resumed run would use only the remaining batches. `TokenWeighted` modules save
    their gradients themselves.

    Attributes:
        in_batch: Whether a backward pass has begun in a batch that has not ended, so that gradients may be incomplete.
    """

    def __init__(self) -> None:
        self.in_batch = False
        self._open = False  # gradients were accumulated since the last optimizer step
        self._stored: Mapping[str, Any] | None = None

    def after_batch(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Record whether the optimizer step continues with the next batch."""
        self.in_batch = False
        mine = module.automatic_optimization and not isinstance(module, TokenWeighted)
        self._open = mine and trainer.fit_loop.epoch_loop._should_accumulate()

    def state(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, Any]:
        """State for a checkpoint; a collective under DDP."""
        if not self._open:
            return {}
        return {"gradients": {} if self.in_batch else gradients_so_far(trainer, module)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Load the state; `give_back` restores the gradients from it."""
        self._stored = state.get("gradients")

    def give_back(self, module: L.LightningModule) -> None:
        """Restore the gradients; call it in ``on_train_start``, after Lightning has cleared them."""
        stored, self._stored = self._stored, None
        self.in_batch = self._open = False
        if stored is None:
            return
        if not stored:
            rank_zero_warn(
                "Resuming inside an optimizer step whose first gradients are not in the checkpoint: this step uses only the"
                " remaining batches. Make checkpoints between steps (val_check_interval, every_n_train_steps)."
            )
        parameters = {clean_name(name): parameter for name, parameter in module.named_parameters()}
        for name, gradient in stored.items():
            where = parameters[clean_name(name)]
            value: Tensor = gradient.to(where.device, where.dtype)
            where.grad = value
        self._open = True
