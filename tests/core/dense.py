"""Converted layers with a random, non-zero U, and the dense ``W + s C U R`` that they must equal.

The reference is formed another way than in the library: orthonormal coordinates by the two orthonormal factors, not by the
inverse triangular ones, and everything in plain autograd.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_pmss import PMSSConfig
from lightning_pmss.layers.adapted import AdaptedLinear
from lightning_pmss.methods.pmss.layer import PMSSLinear
from lightning_pmss.methods.pmss.method import PMSS
from lightning_pmss.methods.pmss.selection import select_skeleton

KINDS = ("linear", "conv1d")
EDITS = ("input", "output")
MEMORIES = ("keep", "regather")
COORDINATES = ("raw", "spectral", "orthonormal", "rotation")


def base_layer(
    kind: str, out: int, inp: int, *, bias: float | None = 1.0, dtype: torch.dtype = torch.float64, seed: int = 0
) -> nn.Module:
    """A linear layer with W of norm about sqrt(out) and a random bias of the given size (None: no bias)."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, inp, generator=generator, dtype=torch.float64) / inp**0.5
    layer: nn.Module
    if kind == "conv1d":
        from transformers.pytorch_utils import Conv1D

        layer = Conv1D(out, inp)
        layer.weight = nn.Parameter(weight.T.contiguous())
        if bias is None:
            layer.bias = None
    else:
        layer = nn.Linear(inp, out, bias=bias is not None)
        layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias * torch.randn(out, generator=generator, dtype=torch.float64))
    return layer.to(dtype).requires_grad_(False)


def pmss_layer(
    kind: str = "linear",
    out: int = 12,
    inp: int = 10,
    rank: int = 4,
    *,
    bias: float | None = 1.0,
    dtype: torch.dtype = torch.float64,
    size: float = 0.3,
    seed: int = 0,
    coordinates: str = "orthonormal",
    **adopt: Any,
) -> PMSSLinear:
    """A converted layer; the norm of its update is ``size`` times that of W."""
    return train(
        adopted(base_layer(kind, out, inp, bias=bias, dtype=dtype, seed=seed), rank, coordinates, **adopt), size
    )


def adopted(
    layer: nn.Module, rank: int, coordinates: str = "orthonormal", scale: float = 1.0, **options: Any
) -> PMSSLinear:
    """Convert one layer as it stands; U is zero."""
    stored = layer.weight.detach()  # type: ignore[union-attr, operator]
    weight = stored.T if type(layer).__name__ == "Conv1D" else stored
    rows, cols = select_skeleton(weight, rank)
    method = PMSS(PMSSConfig(rank=rank, coordinates=coordinates, **options))
    derived = method.derive(weight, rank, "", {"rows": rows, "cols": cols})
    start = method.start((weight.shape[0], weight.shape[1]), rank, "")
    converted = AdaptedLinear.adopt(layer, method, rank, start, derived, scale)
    assert isinstance(converted, PMSSLinear)
    converted.requires_grad_(False)
    converted.core.weight.requires_grad_(True)
    return converted


def train(layer: PMSSLinear, size: float = 0.3, seed: int = 1) -> PMSSLinear:
    """Give a converted layer a random update of ``size`` times the norm of W."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.core.weight.copy_(torch.randn(layer.core.weight.shape, generator=generator, dtype=torch.float64))
        layer.core.weight.mul_(size * layer.base_weight().double().norm() / update(layer).norm())
    return layer


def update(layer: PMSSLinear) -> Tensor:
    """``s C U R [out, in]`` in float64, with U as the layer says."""
    return layer.weight_columns().double() @ layer.core_update().detach().double() @ layer.weight_rows().double()


def dense_weight(layer: PMSSLinear, v: Tensor) -> Tensor:
    """``W + s C U R`` in canonical layout, differentiable in the trained tensor ``v``, from the definition alone."""
    weight = layer.weight.detach().T if layer.transposed else layer.weight.detach()
    c, r = weight[:, layer.cols], weight[layer.rows]
    if layer.coordinates == "orthonormal":
        delta = torch.linalg.qr(c).Q @ v @ torch.linalg.qr(r.T).Q.T
    elif layer.coordinates == "rotation":
        q_c, q_r = torch.linalg.qr(c).Q, torch.linalg.qr(r.T).Q
        part = q_c.T @ weight @ q_r
        angle = torch.zeros_like(part)
        angle[torch.tril(torch.ones_like(part), -1).bool()] = (
            layer.scale * v.flatten() / (8 * part.square().mean() * len(part)).sqrt()
        )
        eye = torch.eye(len(part), dtype=part.dtype)
        rotation = torch.linalg.inv(eye - angle + angle.T) @ (eye + angle - angle.T)
        return weight + q_c @ part @ (rotation - eye) @ q_r.T
    else:
        delta = c @ v @ r
        if layer.coordinates == "spectral":
            delta = delta / (torch.linalg.matrix_norm(c, 2) * torch.linalg.matrix_norm(r, 2))
    return weight + layer.scale * delta


def random_like(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 2) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def relative(actual: Tensor, expected: Tensor) -> float:
    """``||actual - expected|| / ||expected||`` in float64."""
    return float((actual.detach().double() - expected.detach().double()).norm() / expected.detach().double().norm())


def gain(actual: Tensor, expected: Tensor) -> float:
    """The share of the expected that the actual carries: ``<actual, expected> / <expected, expected>``."""
    actual, expected = actual.detach(), expected.detach()
    return float((actual.double() * expected.double()).sum() / expected.double().square().sum())
