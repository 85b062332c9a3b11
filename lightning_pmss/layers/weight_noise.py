"""Gaussian noise on the merged weight of an adapted layer, without a change of the weight.

``y = (W' + N) x`` is computed as the layer's own ``W' x`` plus ``N x``. N is drawn in the forward pass and drawn again in the
backward pass from the same seed, so a pass keeps a seed and one number per row, and W stays as it is, whatever its dtype: also
packed codes, which nothing could be added to.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_pmss.layers.adapted import AdaptedLinear
from lightning_pmss.layers.products import without_autocast

_ROWS = 1024  # of W' that are formed at a time, for their norms


@torch.no_grad()
def merged_row_norms(layer: AdaptedLinear) -> Tensor:
    """Norms of the rows of W', float32 ``[out]``; call it where the layer's own forward could run."""
    weight, update = layer.base_weight(), layer.update()
    found = []
    for start in range(0, len(weight), _ROWS):
        rows = slice(start, start + _ROWS)
        merged = weight[rows].float() + update.delta(weight, rows, torch.float32)
        found.append(torch.linalg.vector_norm(merged, dim=1))
    return torch.cat(found)


def seed_of(*words: object) -> int:
    """A seed of 63 bits that depends on all the words, and on nothing else."""
    digest = hashlib.blake2b(repr(words).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class NoiseProduct(torch.autograd.Function):
    """``N x``, row-wise over tokens, with ``N[i, j] ~ Normal(0, std[i]^2)`` drawn from a seed.

    x ``[tokens, in]``; std float32 ``[out]``. N has the dtype of x. Saved for backward: std.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, std: Tensor, seed: int) -> Tensor:
        ctx.save_for_backward(std)
        ctx.seed, ctx.inputs = seed, x.shape[1]
        with without_autocast(x):
            return x @ draw(std, x.shape[1], seed, x.dtype).T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        if not ctx.needs_input_grad[0]:
            return None, None, None
        (std,) = ctx.saved_tensors
        with without_autocast(grad):
            return grad @ draw(std, ctx.inputs, ctx.seed, grad.dtype), None, None


def draw(std: Tensor, inputs: int, seed: int, dtype: torch.dtype) -> Tensor:
    """N ``[out, in]``; the global random state is neither read nor changed."""
    generator = torch.Generator(std.device).manual_seed(seed)
    noise = torch.randn(len(std), inputs, generator=generator, device=std.device, dtype=dtype)
    return noise.mul_(std.to(dtype)[:, None])
