"""Updates in layers of a larger rank, and weighted sums of updates, exactly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_pmss.layers.products import core_dtype
from lightning_pmss.methods.pmss.coordinates import Frame, PMSSCore, coordinate_frame

Triple = tuple[Tensor, Tensor, Tensor]
"""U ``[c, r]`` with the scale, rows int64 ``[r]``, cols int64 ``[c]``."""


def padded(weight: Tensor, update: Triple, rank: int, coordinates: str, scale: float, name: str) -> dict[str, Tensor]:
    """The tensors of a layer of the given rank, which may be larger than the update's, that mean the update.

    The indices are filled up with others that are not in use, and U with zeros.

    Args:
        weight: The pristine W ``[out, in]``.
        update: See `Triple`.
        rank: K, at least the update's, at most W's smaller side.
        coordinates: Of the live layer.
        scale: Of the live layer.
        name: Module name for errors.
    """
    device, dtype = weight.device, core_dtype(weight.dtype)
    u, rows, cols = (tensor.to(device) for tensor in update)
    r, c = weight.index_select(0, rows), weight.index_select(1, cols)
    frame = _frame(c, r, coordinates, dtype)
    core = PMSSCore(len(cols), len(rows), frame, dtype, device)
    numbers = core.numbers_of(u, scale, name)
    all_rows, all_cols = filled(rows, rank, weight.shape[0]), filled(cols, rank, weight.shape[1])
    if frame.left is not None and frame.right is not None and (len(all_rows), len(all_cols)) != (len(rows), len(cols)):
        more_r, more_c = weight[all_rows[len(rows) :]], weight[:, all_cols[len(cols) :]]
        frame = Frame(_extended(frame.left, more_c), _extended(frame.right, more_r.T), frame.gain)
    v = F.pad(numbers, (0, rank - len(rows), 0, rank - len(cols)))
    return {"weight": v, "rows": all_rows, "cols": all_cols} | frame.present()


def trimmed(u: Tensor, rows: Tensor, cols: Tensor) -> Triple:
    """The update without the indices on which U is zero."""
    of_rows, of_cols = u.ne(0).any(dim=0), u.ne(0).any(dim=1)
    if not bool(of_rows.any()):  # never trained: one pair of indices stands for it
        of_rows[0] = of_cols[0] = True
    return u[of_cols][:, of_rows], rows[of_rows], cols[of_cols]


def weighted(updates: Sequence[tuple[float, Triple]]) -> Triple:
    """The weighted sum of updates of one W, exactly: U's add where the indices agree, else over the union of them.

    Raises:
        IndexError: Nothing to add.
    """
    first = updates[0][1][0]
    rows, cols = _union([rows for _, (_, rows, _) in updates]), _union([cols for _, (_, _, cols) in updates])
    total = torch.zeros(len(cols), len(rows), dtype=first.dtype, device=first.device)
    for weight, (u, own_rows, own_cols) in updates:
        places = torch.searchsorted(cols, own_cols)[:, None], torch.searchsorted(rows, own_rows)[None, :]
        total[places] += weight * u
    return total, rows, cols


def filled(indices: Tensor, count: int, size: int) -> Tensor:
    """The indices and the smallest others below `size`, `count` in all."""
    free = torch.ones(size, dtype=torch.bool, device=indices.device)
    free[indices] = False
    return torch.cat([indices, free.nonzero()[:, 0][: count - len(indices)]])


def _frame(columns: Tensor, rows: Tensor, coordinates: str, dtype: torch.dtype) -> Frame:
    try:
        return coordinate_frame(columns, rows, coordinates)
    except ValueError:  # slices that depend on one another have no orthonormal coordinates
        eyes = (torch.zeros(0, 0, dtype=dtype, device=rows.device) for _ in range(2))
        left, right = (_extended(eye, part) for eye, part in zip(eyes, (columns, rows.T), strict=True))
        return Frame(left, right)


def _extended(factor: Tensor, columns: Tensor) -> Tensor:
    """The factor with ``1 / norm2(columns)`` on the diagonal for each column more, so that it stays invertible."""
    size = torch.linalg.matrix_norm(columns.double(), 2)
    unit = 1.0 / size if size > 0 else torch.ones_like(size)
    more = torch.eye(columns.shape[1], dtype=factor.dtype, device=factor.device) * unit.to(factor.dtype)
    return torch.block_diag(factor, more)


def frame_of_rows(rows: Tensor, own: int, coordinates: str) -> Frame:
    """The frame of a one-sided skeleton of rows ``[k, in]``: the first `own` are an update's, the others fill up."""
    try:
        frame = coordinate_frame(None, rows[:own], coordinates)
    except ValueError:  # rows that depend on one another have no orthonormal coordinates
        frame = Frame(
            right=_extended(torch.zeros(0, 0, dtype=core_dtype(rows.dtype), device=rows.device), rows[:own].T)
        )
    if frame.right is None or own == len(rows):
        return frame
    return frame._replace(right=_extended(frame.right, rows[own:].T))


def _union(parts: Sequence[Tensor]) -> Tensor:
    union: Tensor = torch.cat(list(parts)).unique()  # sorted
    return union
