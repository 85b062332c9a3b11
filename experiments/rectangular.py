"""Cores that are not square, and cores smaller than their skeleton: more columns than rows, or more of both than are trained.

``C U R = C A V[:a, :b] B R`` with ``C A`` [out, a] and ``B R`` [b, in] orthonormal. ``"chosen"``: they span a of the columns
and b of the rows, those that ``lupp`` takes out of C and R. ``"leading"``: the leading singular directions of C and R, so that
a skeleton larger than the core (an oversampled one) says which.
"""

from __future__ import annotations

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from typing_extensions import override

from lightning_pmss.methods.pmss.layer import pmss_layers
from lightning_pmss.methods.pmss.selection import select_skeleton

KINDS = ("chosen", "leading")


def basis(columns: Tensor, count: int, kind: str) -> Tensor:
    """A [c, count] with ``columns @ A`` [d, count] orthonormal."""
    columns = columns.detach().double()
    if kind == "leading":
        _, s, right = torch.linalg.svd(columns, full_matrices=False)
        return (right[:count].T / s[:count]).float()
    _, chosen = select_skeleton(columns, count)
    chosen = chosen.sort().values
    factor = torch.linalg.qr(columns[:, chosen]).R
    return torch.eye(columns.shape[1], dtype=torch.float64)[:, chosen].matmul(torch.linalg.inv(factor)).float()


class RectangularFrame(nn.Module):
    """Takes the place of `CoreFrame`: U [r, r] from the first ``left`` x ``right`` entries of the trained V [r, r]."""

    core = None  # `PMSSCore` asks: it is not the library's own rotation

    def __init__(self, columns: Tensor, rows: Tensor, left: int, right: int, kind: str) -> None:
        super().__init__()
        rank = len(rows)
        left, right = min(left, rank), min(right, rank)
        self.left = nn.Buffer(basis(columns, left, kind))
        self.right = nn.Buffer(basis(rows.T, right, kind).T.contiguous())
        self.unused = rank * rank - left * right

    @override
    def forward(self, v: Tensor) -> Tensor:
        """U [r, r]."""
        return self.left @ v[: self.left.shape[1], : len(self.right)] @ self.right


class RectangularCore(Callback):
    """Puts `RectangularFrame` into every converted layer before training."""

    def __init__(self, left: int, right: int, kind: str = "chosen") -> None:
        if kind not in KINDS:
            raise ValueError(f"sides.kind={kind!r} is not known; choose one of {list(KINDS)}.")
        self.left, self.right, self.kind = left, right, kind

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for layer in pmss_layers(pl_module).values():
            rows, columns = layer.slices()
            frame = RectangularFrame(columns, rows, self.left, self.right, self.kind)
            layer.core.frame = frame  # type: ignore[assignment]
