"""Detect changes that other code makes to the frozen weights of converted layers during a fit.

A user's callback that averages ``pl_module.parameters()`` and copies the average back rounds W, for example. The update
``s C U R``, and with it the adapter, belongs to the former W.
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
_SAMPLES = 1024  # per weight; an average changes far more than one number in a thousand


class FrozenWatch:
    """Compare samples of the frozen weights with their values at the start of the training.

    Args:
        layers: Converted layers by canonical name, not sharded; weights of quantised ones are not compared.
    """

    def __init__(self, layers: Mapping[str, AdaptedLinear]) -> None:
        self.layers = {name: layer for name, layer in layers.items() if not layer.quantised}
        self._before = {name: _sample(layer.weight) for name, layer in self.layers.items()}
        self._indices = {name: _on_cpu(layer.indices()) for name, layer in layers.items()}
        self._prints = {name: layer.fingerprint for name, layer in self.layers.items()}

    def changes(self) -> dict[str, float]:
        """Norm of the change relative to the norm of the weight, by name of each changed layer."""
        changes = {}
        for name, layer in self.layers.items():
            now = _sample(layer.weight)
            before = self._before[name].to(now.dtype)  # a cast is no change
            indices = self._indices[name]
            if any(not torch.equal(index, indices[part]) for part, index in _on_cpu(layer.indices()).items()):
                changes[name] = float("inf")  # the update now uses other rows and columns
            elif not torch.allclose(now, before, rtol=0, atol=0, equal_nan=True):
                norm = float(before.double().norm())
                changes[name] = float((now.double() - before.double()).norm()) / norm if norm else float("inf")
        return changes

    def keep_fingerprints(self) -> None:
        """Restore the fingerprints of the original weights, which loading a state dict clears."""
        for name, layer in self.layers.items():
            layer.fingerprint = layer.fingerprint or self._prints[name]

    def other_base(self, adapter: Path) -> str | None:
        """Error message if the frozen weights were changed; None if they were not.

        A change within the rounding of float32, as from an average of equal values, gives only a warning.

        Args:
            adapter: Folder of the adapter, for the message.
        """
        if not (changes := self.changes()):
            return None
        what = (
            f"the frozen weights of {some(list(changes))} were changed during the training (by up to"
            f" {max(changes.values()):.1e} of their norm). Something outside of the callback writes to all parameters of the"
            " module, such as an average that is copied back; limit it to those that require grad, or use Lightning's"
            " EMAWeightAveraging."
        )
        if max(changes.values()) <= _ROUNDING:
            rank_zero_warn(f"{what} The merged model has the changed weights.")
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
