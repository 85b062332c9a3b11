"""State dicts of the module in a Lightning checkpoint: saved without the frozen weights, whole again when they are loaded.

``checkpoint["state_dict"]`` is one. Callbacks add others: ``WeightAveraging`` puts its average there and the weights that the
training goes on with into ``checkpoint["current_model_state"]``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def module_states(checkpoint: Mapping[str, Any], trained: Collection[str], known: Collection[str]) -> dict[str, Any]:
    """The entries of a checkpoint that are state dicts of the module.

    Args:
        checkpoint: As Lightning makes or loads it.
        trained: Keys of the module's state dict that checkpoints keep.
        known: All keys of it.
    """
    trained, known = set(trained), set(known)
    return {
        name: value
        for name, value in checkpoint.items()
        if isinstance(value, Mapping) and not trained.isdisjoint(value) and known.issuperset(value)
    }


def make_whole(checkpoint: dict[str, Any], module: nn.Module, trained: Collection[str], known: Collection[str]) -> None:
    """Put the module's own frozen weights into all its state dicts but the first: callbacks load these strictly."""
    live = module.state_dict()
    for name, state in module_states(checkpoint, trained, known).items():
        if name != "state_dict":
            checkpoint[name] = {**live, **state}


@contextmanager
@torch.no_grad()
def holding(module: nn.Module, state: Mapping[str, Any]) -> Iterator[None]:
    """Within it the module has the values of a state dict, where these are others than its own."""
    own: dict[str, Tensor] = dict(module.named_parameters()) | dict(module.named_buffers())
    others = {
        k: v for k, v in state.items() if k in own and not (v is own[k] or torch.equal(v.to(own[k].device), own[k]))
    }
    before = {key: own[key].detach().clone() for key in others}
    for key, value in others.items():
        own[key].copy_(value)
    try:
        yield
    finally:
        for key, value in before.items():
            own[key].copy_(value)
