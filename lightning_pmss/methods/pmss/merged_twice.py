"""Recognise a merged weight by itself, so that it is never taken for the W that U is added to."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def is_merged(base: Tensor, loaded: Tensor, rows: Tensor, cols: Tensor | None) -> bool:
    """Whether ``loaded`` is ``base + base[:, cols] @ U @ base[rows]`` for some U, up to its own rounding.

    False where U has room for any change, as in a square layer of full rank: there nothing can be told.

    Args:
        base: W ``[out, in]``.
        loaded: Of the same shape, any floating dtype.
        rows: ``[r]``.
        cols: ``[c]``; None: ``base + U @ base[rows]``.
    """
    if loaded.shape != base.shape or torch.equal(loaded.to(base.dtype), base.to(loaded.device)):
        return False
    if len(rows) * (len(base) if cols is None else len(cols)) > base.numel() / 2:
        return False
    # Of the stored weights (uniform, at most half a step each), and of the products that made them.
    steps = max(torch.finfo(base.dtype).eps, torch.finfo(loaded.dtype).eps)
    products = torch.finfo(torch.float64 if base.dtype == torch.float64 else torch.float32).eps
    rounding = (0.6 * steps + 16 * products) * float(loaded.double().norm())
    base = base.double()
    change = loaded.to(base.device).double() - base
    if not float(change.norm()) > 2 * rounding:  # too near to tell, or not finite
        return False
    right = torch.linalg.qr(base[rows.to(base.device)].T).Q
    between = change @ right @ right.T
    if cols is not None:
        left = torch.linalg.qr(base[:, cols.to(base.device)]).Q
        between = left @ (left.T @ between)
    return float((change - between).norm()) <= rounding
