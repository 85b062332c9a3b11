"""Products of a linear layer, in the dtype in which the layer computes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # the dtypes of a W that is read and written


def dropped(x: Tensor, probability: float, training: bool) -> Tensor:
    """Dropout in a training pass; x itself where nothing is dropped, since autograd would keep a mask of ones."""
    return F.dropout(x, probability) if training and probability > 0 else x


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which a linear layer would compute: autocast's where it applies (never to float64), else the input's."""
    device = tensor.device.type
    # The meta device, on which shapes and operations are counted, has no autocast and raises when asked.
    if tensor.dtype != torch.float64 and device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return tensor.dtype


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """A context in which products of such tensors are computed in their own dtype."""
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


def product(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """``W x (+ b)`` of a layer that stores W, or W^T (transposed; then a bias asks for two-dimensional x)."""
    if not transposed:
        return F.linear(x, weight, bias)
    return x @ weight if bias is None else torch.addmm(bias, x, weight)


def core_dtype(weight_dtype: torch.dtype) -> torch.dtype:
    """Of what is trained beside a weight: float32 whatever the base, float64 on a float64 base."""
    return torch.float64 if weight_dtype == torch.float64 else torch.float32
