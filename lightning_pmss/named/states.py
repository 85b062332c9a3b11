"""One layer's part of a named adapter, in the form that the live layer takes: padded to its rank, in its coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_pmss.methods.pmss.coordinates import Frame, PMSSCore, coordinate_frame, core_dtype


class Update(NamedTuple):
    """``W' = W + W[:, cols] @ u @ W[rows]``.

    Attributes:
        u: ``s U [c, r]``, float32 or float64.
        rows: int64 ``[r]``.
        cols: int64 ``[c]``.
    """

    u: Tensor
    rows: Tensor
    cols: Tensor


@dataclass
class LayerState:
    """What is copied into a live layer when its adapter becomes the active one.

    Attributes:
        rows: int64 ``[k]``.
        cols: int64 ``[k]``.
        v: The trained tensor ``[k, k]``.
        frame: Of its coordinates.
    """

    rows: Tensor
    cols: Tensor
    v: Tensor
    frame: Frame


def layer_state(
    weight: Tensor, update: Update, rank: int, coordinates: str, scale: float, name: str = ""
) -> LayerState:
    """An update in the form of a layer of the given rank, which may be larger than the update's.

    The indices are filled up with others that are not in use, and U with zeros: the update stays what it is.

    Args:
        weight: The pristine W ``[out, in]``.
        update: See `Update`.
        rank: k, at least the update's, at most W's smaller side.
        coordinates: Of the live layer.
        scale: Of the live layer.
        name: Module name for errors.
    """
    device, dtype = weight.device, core_dtype(weight.dtype)
    u, rows, cols = (tensor.to(device) for tensor in update)
    r, c = weight.index_select(0, rows), weight.index_select(1, cols)
    frame = _frame(c, r, coordinates, dtype)
    core = PMSSCore(len(cols), len(rows), frame, dtype, device)
    core.set_u(u, scale, name)
    all_rows, all_cols = filled(rows, rank, weight.shape[0]), filled(cols, rank, weight.shape[1])
    if frame.left is not None and frame.right is not None and (len(all_rows), len(all_cols)) != (len(rows), len(cols)):
        more_r, more_c = weight[all_rows[len(rows) :]], weight[:, all_cols[len(cols) :]]
        frame = Frame(_extended(frame.left, more_c), _extended(frame.right, more_r.T), frame.gain)
    v = F.pad(core.weight.detach(), (0, rank - len(rows), 0, rank - len(cols)))
    return LayerState(all_rows, all_cols, v, frame)


def update_of(state: LayerState, scale: float) -> Update:
    """The inverse of `layer_state`, without the indices on which U is zero."""
    core = PMSSCore(len(state.cols), len(state.rows), state.frame, state.v.dtype, state.v.device)
    core.weight.data.copy_(state.v)
    u = core(scale).detach()
    rows, cols = u.ne(0).any(dim=0), u.ne(0).any(dim=1)
    if not bool(rows.any()):  # never trained: one pair of indices stands for it
        rows[0] = cols[0] = True
    return Update(u[cols][:, rows], state.rows[rows], state.cols[cols])


def weighted(updates: Sequence[tuple[float, Update]]) -> Update:
    """The weighted sum of updates of one W, exactly: U's add where the indices agree, else over the union of them.

    Raises:
        IndexError: Nothing to add.
    """
    first = updates[0][1]
    rows, cols = _union([u.rows for _, u in updates]), _union([u.cols for _, u in updates])
    total = torch.zeros(len(cols), len(rows), dtype=first.u.dtype, device=first.u.device)
    for weight, (u, own_rows, own_cols) in updates:
        places = torch.searchsorted(cols, own_cols)[:, None], torch.searchsorted(rows, own_rows)[None, :]
        total[places] += weight * u
    return Update(total, rows, cols)


def same_skeleton(updates: Sequence[Update]) -> bool:
    """Whether all updates have the same rows and columns, in any order."""
    rows, cols = _union([u.rows for u in updates]), _union([u.cols for u in updates])
    return all(len(u.rows) == len(rows) and len(u.cols) == len(cols) for u in updates)


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


def _union(parts: Sequence[Tensor]) -> Tensor:
    union: Tensor = torch.cat(list(parts)).unique()  # sorted
    return union
