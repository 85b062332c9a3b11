"""State dicts of the module in a Lightning checkpoint: saved without the frozen weights, and completed when loaded.

``checkpoint["state_dict"]`` is one, and callbacks may add others: ``WeightAveraging`` stores its average in this one, and the
weights to resume from in ``checkpoint["current_model_state"]``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pmss.layers.parts import clean_name, clean_state, own_keys


def module_states(checkpoint: Mapping[str, Any], trained: Collection[str], known: Collection[str]) -> dict[str, Any]:
    """Find the entries of a checkpoint that are state dicts of the module; return them with clean names.

    Args:
        checkpoint: Checkpoint as Lightning makes or loads it.
        trained: Clean names in the module's state dict that checkpoints contain.
        known: All clean names in the module's state dict.
    """
    trained, known = set(trained), set(known)
    found = {}
    for name, value in checkpoint.items():
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            state = {clean_name(key): tensor for key, tensor in value.items()}
            if name == "state_dict" or (not trained.isdisjoint(state) and known.issuperset(state)):
                found[name] = state
    return found


def make_whole(checkpoint: dict[str, Any], module: nn.Module, trained: Collection[str], known: Collection[str]) -> None:
    """Give all state dicts of the module its own keys, and those of callbacks its frozen weights."""
    for name, state in module_states(checkpoint, trained, known).items():
        whole = state if name == "state_dict" else clean_state(module) | state
        checkpoint[name] = own_keys(module, whole)


@contextmanager
@torch.no_grad()
def holding(module: nn.Module, state: Mapping[str, Any]) -> Iterator[None]:
    """Set the module to the values of a state dict with clean names inside the ``with`` block, and restore it after."""
    own: dict[str, Tensor] = dict(module.named_parameters()) | dict(module.named_buffers())
    own = {clean_name(name): tensor for name, tensor in own.items()}
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
