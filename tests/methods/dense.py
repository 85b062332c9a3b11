"""Two layers in float64, one stored as W and one as W^T, whose W' a test says itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lightning_pmss import AdaptedLinear, AdapterConfig, convert
from lightning_pmss.conversion.convert import adapted_layers

TARGETS = ["0", "1"]


def layers(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """``[6, 12]`` as W, ``[18, 6]`` as W^T."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 6), Conv1D(18, 6))
    for parameter in model.parameters():
        parameter.data.normal_(generator=generator).mul_(0.5)
    return model.to(dtype)


def trained(model: nn.Module, config: AdapterConfig, size: float = 0.3) -> list[AdaptedLinear]:
    """Convert and give every trained tensor random values."""
    convert(model, config)
    found = list(adapted_layers(model).values())
    generator = torch.Generator().manual_seed(1)
    for layer in found:
        for tensor in layer.core.trained().values():
            tensor.data = size * torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)
    return found


def is_dense(config: AdapterConfig, changed: Callable[[Tensor, Any], Tensor]) -> None:
    """Output and gradients of the converted layers are those of ``changed(W, core)``."""
    model = layers()
    converted = trained(model, config)
    x = torch.randn(5, 2, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    own = [t for layer in converted for t in layer.core.trained().values()]
    found = model(x)
    h = x
    for layer in converted:
        h = F.linear(h, changed(layer.base_weight(), layer.core), layer.bias)
    torch.testing.assert_close(found, h)
    assert (found - layers()(x)).abs().max() > 0.1
    for one, other in zip(
        torch.autograd.grad(found.square().sum(), [x, *own]),
        torch.autograd.grad(h.square().sum(), [x, *own]),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
        assert one.abs().max() > 1e-3
