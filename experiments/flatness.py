"""How flat the minimum is that a run ended in: the loss with Gaussian noise of growing size on the merged weights.

The noise of a row of W' has the standard deviation ``size |row| / sqrt(in)``, as `FlatLoRA` has it: its norm is about ``size``
times the row's. One draw, the same for all sizes and all runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pmss.conversion.convert import adapted_layers
from lightning_pmss.layers.weight_noise import draw, merged_row_norms, seed_of

SIZES = (0.05, 0.1, 0.2, 0.4)


@contextmanager
def noisy(model: nn.Module) -> Iterator[list[float]]:
    """Add noise to the outputs of all converted layers, ``size`` times the product with one fixed draw.

    Yields:
        A list with one entry, the size; it starts at 0, set it at will.

    Raises:
        ValueError: The model is not converted by this library.
    """
    if not (layers := adapted_layers(model)):
        raise ValueError("noise is added to the layers that this library converts, and the model has none.")
    size = [0.0]
    drawn = {}
    for name, layer in layers.items():
        weight = layer.base_weight()
        inputs = weight.shape[1]
        drawn[name] = draw(merged_row_norms(layer) / inputs**0.5, inputs, seed_of(name), weight.dtype)

    def adder(noise: Tensor) -> Any:
        @torch.no_grad()
        def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output + size[0] * nn.functional.linear(inputs[0], noise.to(inputs[0].dtype)).to(output.dtype)

        return add

    handles = [layer.register_forward_hook(adder(drawn[name])) for name, layer in layers.items()]
    try:
        yield size
    finally:
        for handle in handles:
            handle.remove()
