"""Predict, before training, how much of an update in orthonormal coordinates low precision would destroy.

There ``U = T_C^-1 V T_R^-T``. Where the selected columns or rows are nearly dependent, as they are when the rank is a square
layer's width, U's entries are large and cancel in ``C U R``: rounded to bfloat16, little of the update may be left.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_pmss.methods.pmss.coordinates import Frame

LOW_PRECISION = (torch.bfloat16, torch.float16)
LIMIT = 0.1
"""Share of an update that may be lost to rounding before a conversion warns."""
_INPUTS = 16


def rounding_error(frame: Frame, dtype: torch.dtype) -> float:
    """``||C fl(fl(U) fl(R x)) - C U R x|| / ||C U R x||`` for random V and x, where fl rounds to the dtype of the products.

    Args:
        frame: Of orthonormal coordinates; 0.0 for any other, whose U is trained as it is used.
        dtype: In which the layer computes: the base's.
    """
    if frame.left is None or frame.right is None:
        return 0.0
    # left and right are the inverses of T_C and T_R^T, and ||C y|| = ||T_C y||. In the row space of R, R x = T_R^T z.
    left, right = frame.left.double().cpu(), frame.right.double().cpu()
    generator = torch.Generator().manual_seed(0)
    sizes = len(left), len(right), len(right)
    # V = a b^T of low rank, so that no product of whole matrices is needed.
    a, b, z = (torch.randn(n, _INPUTS, generator=generator, dtype=torch.float64) for n in sizes)
    u = (left @ a) @ (b.T @ right)
    h = torch.linalg.solve_triangular(right, z, upper=False)
    t = _rounded(u, dtype) @ _rounded(h, dtype)
    found = torch.linalg.solve_triangular(left, _rounded(t, dtype), upper=True)
    exact = a @ (b.T @ z)
    return float((found - exact).norm() / exact.norm())


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).double()


def fitting_rank(frame: Frame, dtype: torch.dtype) -> int:
    """The largest of 7/8, 6/8, ... of the rank at which the error is within `LIMIT`, else 1/8; at least 1.

    Tried on the first of the columns and rows at hand; a skeleton chosen for that rank is at least about as good.
    """
    assert frame.left is not None
    assert frame.right is not None
    rank = min(len(frame.left), len(frame.right))
    for eighths in range(7, 1, -1):
        fewer = max(1, rank * eighths // 8)
        if rounding_error(Frame(frame.left[:fewer, :fewer], frame.right[:fewer, :fewer]), dtype) <= LIMIT:
            return fewer
    return max(1, rank // 8)
