"""The forward pass of methods that form W', or its change, for the tokens of a pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_pmss.layers.convertible import has_own_product
from lightning_pmss.layers.products import compute_dtype


def formed_forward(layer: Any, x: Tensor, product: Callable[[Tensor, bool], Tensor]) -> Tensor:
    """``W' x + bias``: one product with W' where that loses nothing, else the base and a product with its change.

    W' in a low precision would round a small change away, and a black box computes its base itself.

    Args:
        layer: Converted.
        x: ``[..., in]``.
        product: From x ``[tokens, in]`` in the compute dtype to ``W' x`` (True) or ``(W' - W) x`` (False), ``[tokens, out]``.
    """
    flat, dtype = x.reshape(-1, x.shape[-1]), compute_dtype(x)
    whole = dtype in (torch.float32, torch.float64) and has_own_product(layer, x.dtype, dtype)
    y = product(flat.to(dtype), whole)
    y = y.view(*x.shape[:-1], y.shape[-1])
    if whole:
        return y if layer.bias is None else y + layer.bias
    base: Tensor = layer.base(x)
    return base + y.to(base.dtype)
