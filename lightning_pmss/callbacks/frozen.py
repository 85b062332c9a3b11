"""Notices when something outside has changed the frozen weights of converted layers during a fit.

A callback of one's own that averages ``pl_module.parameters()`` and copies the average back rounds W. The update ``s C U R`` is
of the W that was there before, and so is the adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_pmss.layers.adapted import AdaptedLinear
from lightning_pmss.messages import some

_ROUNDING = 1e-5
_SAMPLES = 1024  # of each weight: whoever averages a model changes far more than one number in a thousand


class FrozenWatch:
    """Compares samples of the frozen weights with what they were.

    Args:
        layers: Canonical name -> converted layer, whole on this device; those that are kept in codes are left out.
    """

    def __init__(self, layers: Mapping[str, AdaptedLinear]) -> None:
        self.layers = {name: layer for name, layer in layers.items() if not layer.quantised}
        self._before = {name: _sample(layer.weight) for name, layer in self.layers.items()}
        self._indices = {name: _on_cpu(layer.indices()) for name, layer in layers.items()}
        self._prints = {name: layer.fingerprint for name, layer in self.layers.items()}

    def changes(self) -> dict[str, float]:
        """Layers whose weight has changed, with the change relative to the weight's norm."""
        changes = {}
        for name, layer in self.layers.items():
            now = _sample(layer.weight)
            before = self._before[name].to(now.dtype)  # a cast is no change
            indices = self._indices[name]
            if any(not torch.equal(index, indices[part]) for part, index in _on_cpu(layer.indices()).items()):
                changes[name] = float("inf")  # the update is of other rows and columns now
            elif not torch.allclose(now, before, rtol=0, atol=0, equal_nan=True):
                norm = float(before.double().norm())
                changes[name] = float((now.double() - before.double()).norm()) / norm if norm else float("inf")
        return changes

    def keep_fingerprints(self) -> None:
        """A state dict with rounded weights that was loaded would have the adapter belong to these, which no file holds."""
        for name, layer in self.layers.items():
            layer.fingerprint = layer.fingerprint or self._prints[name]

    def other_base(self, adapter: Path) -> str | None:
        """Why no merged model can be made of these weights, and what to do; None if they are what they were, or as good as.

        A change within the rounding of float32, such as an average of equal values leaves, is only warned about.

        Args:
            adapter: Where the adapter is written, which holds nothing of them.
        """
        if not (changes := self.changes()):
            return None
        what = (
            f"the frozen weights of {some(list(changes))} were changed during the training (by up to"
            f" {max(changes.values()):.1e} of their norm). Something outside of PMSSCallback writes to all parameters of the"
            " module, such as an average that is copied back; let it take those that require grad, or use Lightning's"
            " EMAWeightAveraging."
        )
        if max(changes.values()) <= _ROUNDING:
            rank_zero_warn(f"PMSS: {what} The merged model has the changed weights.")
            return None
        return (
            f"{what} No merged model is written. The adapter in {adapter} is for the base as it was:"
            f" `python -m lightning_pmss merge --base BASE --adapter {adapter} --output MERGED`."
        )


@torch.no_grad()
def _sample(weight: Tensor) -> Tensor:
    flat = weight.detach().flatten()
    return flat[:: max(1, flat.numel() // _SAMPLES)].cpu().clone()


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
