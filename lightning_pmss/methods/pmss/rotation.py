"""Rotation coordinates: rotate the block ``M = Q_C^T W Q_R`` of W instead of adding to it.

With thin QR ``C = Q_C T_C`` and ``R^T = Q_R T_R``, M [c, r] is the block of W between the selected columns and rows. In
orthonormal coordinates the update is ``Q_C V Q_R^T`` with V trained; here ``V = M (B - 1)``, and the rotation B [r, r] is made
from ``r (r - 1) / 2`` trained numbers (Cayley's transform of a skew-symmetric matrix). The singular values of M do not change.

Ours, after PSOFT (arXiv 2505.11235), which rotates the principal subspace of W between its singular vectors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def packed_shape(rank: int) -> tuple[int, int]:
    """The shape [a, b] of the ``r (r - 1) / 2`` trained numbers; two dimensions, since engines split the first."""
    return (rank - 1, rank // 2) if rank % 2 == 0 else (rank, (rank - 1) // 2)


def cayley_minus_identity(packed: Tensor, rank: int) -> Tensor:
    """``B - 1`` [r, r] for the rotation ``B = (1 - K)^-1 (1 + K)``.

    K is skew-symmetric; its lower triangle contains the numbers [a, b], row after row.
    """
    change: Tensor = CayleyMinusIdentity.apply(packed, rank)
    return change


class CayleyMinusIdentity(torch.autograd.Function):
    """See `cayley_minus_identity`. Only B - 1 is saved: the backward pass uses ``(1 - K)^-1 = (B + 1) / 2``."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, rank: int) -> Tensor:
        places = torch.tril_indices(rank, rank, -1, device=packed.device)
        k = packed.new_zeros(rank, rank)
        k[places[0], places[1]] = packed.flatten()
        k = k - k.T
        eye = torch.eye(rank, dtype=k.dtype, device=k.device)
        change = torch.linalg.solve(eye - k, 2 * k)  # B itself minus 1 would cancel for small K
        ctx.save_for_backward(change)
        ctx.shape = packed.shape
        return change

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (change,) = ctx.saved_tensors
        rank = len(change)
        more = change + 2 * torch.eye(rank, dtype=change.dtype, device=change.device)  # B + 1
        grad = more.T @ grads[0] @ more.T / 2
        places = torch.tril_indices(rank, rank, -1, device=change.device)
        return (grad - grad.T)[places[0], places[1]].view(ctx.shape), None


def cayley_parameters(core: Tensor, v: Tensor, name: str = "") -> Tensor:
    """The numbers [a, b] whose rotation of `core` comes nearest to v: the inverse of ``core @ cayley_minus_identity(numbers)``.

    Args:
        core: M [c, r].
        v: The change of M, [c, r].
        name: Module name for errors.

    Raises:
        ValueError: M + v is no rotation of M, or one by half a circle, which Cayley's transform cannot reach.
    """
    rank = core.shape[1]
    # Procrustes: the rotation B that brings M B nearest to M + v (Schoenemann 1966).
    eye = torch.eye(rank, dtype=core.dtype, device=core.device)
    try:
        left, _, right = torch.linalg.svd(core.T @ (core + v))
        rotation = left @ right
        k = torch.linalg.solve(rotation + eye, rotation - eye, left=False)
    except torch.linalg.LinAlgError:  # half a circle: no such K
        k = torch.full_like(eye, torch.nan)
    places = torch.tril_indices(rank, rank, -1, device=core.device)
    packed = ((k - k.T) / 2)[places[0], places[1]].view(packed_shape(rank))
    error, size = float((core @ cayley_minus_identity(packed, rank) - v).norm()), float(v.norm())
    if not error <= 1e-3 * size:
        raise ValueError(
            f"`{name}`: this update is not a rotation of the weight (a share of {error / size:.2g} is not): it was trained in"
            " other coordinates; load it with coordinates='orthonormal'."
        )
    return packed
