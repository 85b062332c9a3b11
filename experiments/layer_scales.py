"""A factor of its own for the update of each layer: with orthonormal coordinates and Adam all layers move by the same norm.

LoRA's updates do not: A starts at a size that falls with the width, B's entries all move by the rate, and so a layer of many
outputs moves further. The rules here divide by the geometric mean over the layers, so that the rate keeps its meaning, all
but ``"spectral"``, which needs no mean.
"""

from __future__ import annotations

import math

import lightning as L
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightning_pmss.methods.pmss.layer import PMSSLinear, pmss_layers

RULES = ("spectral", "outputs", "area", "norm")


def factors(layers: dict[str, PMSSLinear], by: str) -> dict[str, float]:
    """The factor of each layer's scale.

    ``"spectral"``: sqrt(out / in), with which a change of the input makes a change of the output of the same mean square
    (arXiv 2310.17813, condition 1). ``"outputs"``: sqrt(out), as LoRA's; ``"area"``: sqrt(out in); ``"norm"``: W's own.
    """
    found = {}
    for name, layer in layers.items():
        weight = layer.base_weight()
        out, inp = weight.shape
        found[name] = {
            "spectral": math.sqrt(out / inp),
            "outputs": math.sqrt(out),
            "area": math.sqrt(out * inp),
            "norm": float(weight.float().norm()),
        }[by]
    mean = 1.0 if by == "spectral" else math.exp(sum(map(math.log, found.values())) / len(found))
    return {name: factor / mean for name, factor in found.items()}


class LayerScales(Callback):
    """Multiplies the scale of every converted layer by its factor, before training."""

    def __init__(self, by: str) -> None:
        if by not in RULES:
            raise ValueError(f"layer_scales={by!r} is not known; choose one of {list(RULES)}.")
        self.by = by

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        layers = pmss_layers(pl_module)
        for name, factor in factors(layers, self.by).items():
            layers[name].scale *= factor
