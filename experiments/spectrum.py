"""The spectrum of what a run has learned: singular values of each layer's change of W, whatever the method."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lightning_pmss import AdaptedLinear

SHARES = (0.5, 0.9, 0.99)


def summary(values: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """What a record keeps of the singular values of many layers.

    Returns:
        ``median``: over the layers of the largest size, of each singular value over the layer's largest one. ``norm`` and
        ``ranks``, by layer: the Frobenius norm of the change, and how many singular values hold 50, 90 and 99 % of its square.
    """
    longest = max(map(len, values.values()))
    scaled = [[x / v[0] for x in v] for v in values.values() if len(v) == longest]
    median = [float(f"{statistics.median(column):.3g}") for column in zip(*scaled, strict=True)]
    norm, ranks = {}, {}
    for name, v in values.items():
        sums = list(itertools.accumulate(x * x for x in v))
        norm[name] = float(f"{sums[-1] ** 0.5:.4g}")
        ranks[name] = [next(i for i, s in enumerate(sums, 1) if s >= share * sums[-1]) for share in SHARES]
    return {"median": median, "norm": norm, "ranks": ranks}


@torch.no_grad()
def spectra(model: Any, folder: str) -> dict[str, list[float]]:
    """Singular values, largest first, of the change of each linear layer that changed, by module name.

    Args:
        model: The trained model: converted by PMSS, a peft model (which is float32 and merged afterwards), or trained in full.
        folder: Of the base, for full fine-tuning.
    """
    changes = dict(_changes(model, folder))
    return {
        name: [float(f"{x:.4g}") for x in torch.linalg.svdvals(change.float()).tolist()]
        for name, change in changes.items()
        if change.abs().max() > 0
    }


def _changes(model: Any, folder: str) -> Any:
    layers = dict(model.named_modules())
    adapted = {name: layer for name, layer in layers.items() if hasattr(layer, "get_base_layer")}
    if adapted:
        for name, layer in adapted.items():
            before = layer.float().get_base_layer().weight.detach().clone()
            layer.merge()  # as each method defines it
            yield name.removeprefix("base_model.model."), layer.get_base_layer().weight - before
    elif any(isinstance(layer, AdaptedLinear) for layer in layers.values()):
        for name, layer in layers.items():
            if isinstance(layer, AdaptedLinear):
                yield name, layer.update().delta(layer.base_weight(), dtype=torch.float32).detach()
    else:
        base = dict(AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype).named_modules())
        for name, layer in layers.items():
            if isinstance(layer, nn.Linear) and "lm_head" not in name:
                yield name, layer.weight.float().cpu() - base[name].weight.float()
