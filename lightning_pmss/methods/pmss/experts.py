"""The products of PMSS on fused experts: those of `lightning_pmss.methods.pmss.layer`, for all experts at once."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_pmss.layers.expert_stack import GroupedLayer
from lightning_pmss.layers.products import dropped, without_autocast
from lightning_pmss.methods.pmss.config import PMSSConfig


def stacked_update(tensors: Mapping[str, Tensor], scale: float) -> Tensor:
    """``s U [experts, c, r]`` from V and the parts of each expert's `Frame`; in float32 also under autocast."""
    v = tensors["weight"]
    wide = torch.promote_types(v.dtype, torch.float32)
    with without_autocast(v):
        u = v.to(wide)
        if "left" in tensors:
            u = tensors["left"].to(wide) @ u @ tensors["right"].to(wide)
        elif "gain" in tensors:
            u = u * tensors["gain"].to(wide)
        return scale * u


def grouped_edit(layer: GroupedLayer, x: Tensor, u: Tensor, config: PMSSConfig) -> Tensor:
    """``W'_e x`` without a bias: the output edit where ``out < in``, else the input edit.

    Args:
        layer: Of all experts.
        x: ``[pairs, in]``, sorted by expert.
        u: ``s U [experts, c, r]``.
        config: The options.
    """
    groups, weight = layer.groups, layer.weight
    rows, cols = layer.indices["rows"], layer.indices["cols"]
    thin = weight.shape[1] < weight.shape[2] if config.edit == "auto" else config.edit == "output"
    if thin:
        y = layer.base(x)
        h = groups.take(y, rows)
        return y + layer.part(layer.linear(dropped(h, config.dropout, layer.training), u), cols, 1)
    h = layer.part(x, rows, 0)
    h = layer.linear(dropped(h, config.dropout, layer.training), u)
    return layer.base(groups.put(x.to(h.dtype), h, cols))


def why_no_expert_options(config: PMSSConfig) -> str | None:
    """Why fused experts cannot be converted with these options, behind the parameter's name; None if they can."""
    if config.coordinates == "rotation":
        return "is a parameter of fused experts, which have no coordinates='rotation'; type coordinates='orthonormal'"
    if config.edit == "weight":
        return "is a parameter of fused experts, which have no edit='weight'; type edit='auto'"
    if config.memory == "keep":
        return "is a parameter of fused experts, whose rows and columns are never kept; type memory='regather'"
    return None
