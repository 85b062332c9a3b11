"""PMSS on convolutions and embeddings: ``y' = y + C U y[rows]`` with the layer's own output ``y = W x``.

``R x`` are entries of y, so the square and the one-sided form both cost one product of features of y: of a convolution, one of
1 x 1 with r input channels. Nothing of x is kept for the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_pmss.layers.applied import AppliedLayer
from lightning_pmss.layers.layout import Layout, picked
from lightning_pmss.layers.operators import operator_of
from lightning_pmss.layers.products import dropped, without_autocast
from lightning_pmss.methods.pmss.config import PMSSConfig


class ColumnProduct(torch.autograd.Function):
    """``W[:, cols] U [out, r]``, in the dtype of U ``[c, r]``. Saved for backward: a reference to the stored W, and cols."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, weight: Tensor, cols: Tensor, layout: Layout) -> Tensor:
        ctx.save_for_backward(weight, cols)
        ctx.layout = layout
        with without_autocast(u):
            return picked(layout.canonical(weight), cols, 1).to(u.dtype) @ u

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, cols = ctx.saved_tensors
        with without_autocast(weight):
            columns = picked(ctx.layout.canonical(weight), cols, 1).to(grads[0].dtype)
            return columns.T @ grads[0], None, None, None


def applied_edit(layer: AppliedLayer, x: Tensor, config: PMSSConfig) -> Tensor:
    """``W' x`` without a bias, whichever form the options choose."""
    index, y = layer.indices, layer.base(x)
    factor = layer.values()["U"]
    if "cols" in index:
        factor = ColumnProduct.apply(factor, layer.layer.weight, index["cols"], layer.layer.layout)
    h = dropped(layer.take(y, index["rows"]), config.dropout, layer.training)
    return y + layer.mixed(h, factor).to(y.dtype)


def why_not_applied(layer: nn.Module, config: PMSSConfig) -> str | None:
    """Why a convolution or an embedding cannot be converted with these options, behind its name; None if it can."""
    if operator_of(layer) is None:
        return None
    if config.edit not in ("auto", "output"):
        return f"is a {type(layer).__name__}, which has no edit={config.edit!r}; type edit='auto'"
    if config.memory == "keep":
        return f"is a {type(layer).__name__}, whose columns are never kept; type memory='regather'"
    return None
