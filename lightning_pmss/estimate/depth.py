"""Extrapolate a deep model's step from two shallow ones: each further equal decoder layer keeps the same number of bytes."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_pmss.estimate.model import Architecture, decoder_blocks
from lightning_pmss.estimate.simulate import StepBytes, simulate_step

SHALLOW = (4, 6)


def estimate_step(architecture: Architecture, model: nn.Module, **options: Any) -> StepBytes:
    """Simulate the model's step, or extrapolate from its first layers if all decoder layers are alike (tested equal)."""
    found = _alike(model)
    if found is None or len(found[1]) <= SHALLOW[1]:
        return simulate_step(architecture, model, **options)
    (owner, name), layers = found
    steps = []
    try:
        for depth in SHALLOW:
            setattr(owner, name, nn.ModuleList(list(layers)[:depth]))
            steps.append(simulate_step(architecture, model, **options))
    finally:
        setattr(owner, name, layers)
    few, more = steps
    further = len(layers) - SHALLOW[1]

    def at_depth(attribute: str) -> int:
        a, b = getattr(few, attribute), getattr(more, attribute)
        return int(b + (b - a) // (SHALLOW[1] - SHALLOW[0]) * further)

    return StepBytes(at_depth("kept"), at_depth("head"), at_depth("body"))


def _alike(model: nn.Module) -> tuple[tuple[nn.Module, str], nn.ModuleList] | None:
    """Return (owner, attribute) and list of the decoder layers if all are in one list and alike, else None."""
    blocks = decoder_blocks(model)
    lists = {block.rpartition(".")[0] for block in blocks}
    if len(lists) != 1:
        return None
    path = lists.pop()
    layers = model.get_submodule(path)
    kinds = getattr(getattr(model, "config", None), "layer_types", None) or ()
    if not isinstance(layers, nn.ModuleList) or len(layers) != len(blocks) or len(set(kinds)) > 1:
        return None
    if len({_signature(layer) for layer in layers}) != 1:
        return None
    owner, _, name = path.rpartition(".")
    return (model.get_submodule(owner), name), layers


def _signature(layer: nn.Module) -> tuple[Any, ...]:
    modules = tuple((name, type(module)) for name, module in layer.named_modules())
    tensors = tuple((n, tuple(p.shape), p.dtype, p.requires_grad) for n, p in layer.named_parameters())
    return modules, tensors
