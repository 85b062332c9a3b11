"""Separate random states for training steps, so that a resumed run is exact.

Between steps, loaders, shuffling samplers and validation loops draw from the global generators. A resumed run creates these
at other moments, so a single saved state does not fit. With separate states for the steps, dropout continues exactly where it
stopped, whatever is drawn between.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_pmss.messages import reason
from lightning_pmss.random_states import as_kept, random_states, set_random_states


class StepRandomness:
    """Swap the global random states at both ends of a training step.

    Attributes:
        inside: States of the steps, saved at the end of the last one; None before the first one, which uses the global
            states and so respects the user's seed.
        outside: States of all other code, saved at the start of the running step; None between steps.
    """

    def __init__(self) -> None:
        self.inside: Mapping[str, Any] | None = None
        self.outside: Mapping[str, Any] | None = None

    def enter(self) -> None:
        self.outside = random_states()
        if self.inside is not None:
            set_random_states(self.inside)

    def leave(self) -> None:
        if self.outside is not None:
            self.inside = random_states()
            set_random_states(self.outside)
            self.outside = None

    def state(self) -> dict[str, Any]:
        """Both states as plain values and tensors, which load with ``weights_only=True``."""
        return {"inside": self.inside, "outside": self.outside or random_states()}

    def load(self, state: Mapping[str, Any]) -> None:
        self.inside, self.outside = state["inside"], None
        set_random_states(state["outside"])

    def states_of_ranks(self) -> list[Any]:
        """States of all processes, as an equal list on each; a collective."""
        if not (dist.is_available() and dist.is_initialized()):
            return [self.state()]
        states: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(states, self.state())
        return states

    def load_of_ranks(self, states: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
        """Restore and return this process's states; None if the number of processes changed."""
        distributed = dist.is_available() and dist.is_initialized()
        rank, world = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
        if len(states) != world:
            rank_zero_warn(
                f"The checkpoint was made on {len(states)} devices, this run has {world}: random numbers will differ."
            )
            return None
        self.load(states[rank])
        return states[rank]


def begin_epoch(trainer: L.Trainer, resumed: Mapping[str, Any] | None) -> None:
    """Restore the random states outside of steps at the first epoch that a resumed run begins.

    Args:
        trainer: Trainer in ``on_train_epoch_start``; Lightning creates the epoch's iterator afterwards.
        resumed: This rank's states from the checkpoint; None after the first step.
    """
    loop = trainer.fit_loop
    begins = trainer.current_epoch > 0 and not loop.is_resuming and not loop.epoch_loop.restarting
    if resumed is not None and begins:
        set_random_states(resumed["outside"])


def refuse_damaged_states(state: Mapping[str, Any], where: str) -> None:
    """Check the states of `StepRandomness.state` by setting them on separate generators.

    Raises:
        ValueError: A state is damaged.
    """
    try:
        for states in (state["outside"], *([] if state["inside"] is None else [state["inside"]])):
            python, numpy = as_kept(states)
            random.Random().setstate(python)
            np.random.RandomState().set_state(numpy)
            torch.Generator().set_state(states["torch"].cpu())
            if not all(isinstance(s, torch.Tensor) and s.dtype == torch.uint8 for s in states["cuda"]):
                raise TypeError("cuda")
    except Exception as error:  # what a damaged state raises depends on where it is damaged
        raise ValueError(
            f"{where}: no states of random generators ({reason(error)}). Use an earlier checkpoint."
        ) from error
