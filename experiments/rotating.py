"""A core that rotates: the part of W between the chosen columns and rows is turned, instead of being added to.

With ``C = Q_C T_C``, ``R^T = Q_R T_R`` and ``Q_C^T W Q_R = P S Z^T`` (thin QR, then the SVD of an r x r matrix), the change
is ``C U R = (Q_C P) (A S B - S) (Z^T Q_R^T)``: A and B are rotations made from the trained r x r tensor, equal to 1 at the
start. The rotations are Cayley's, as in PSOFT (arXiv 2505.11235), which turns the principal subspace of W.
"""

from __future__ import annotations

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from typing_extensions import override

from lightning_pmss.methods.pmss.layer import pmss_layers

KINDS = ("left", "right", "both", "both and scales", "rows")


def cayley(skew: Tensor) -> Tensor:
    """The rotation ``(1 - K)^-1 (1 + K)`` of a skew-symmetric K [r, r]."""
    eye = torch.eye(len(skew), dtype=skew.dtype, device=skew.device)
    return torch.linalg.solve(eye - skew, eye + skew)


class RotatingFrame(nn.Module):
    """Takes the place of `CoreFrame`: U [r, r] from the trained V [r, r].

    The upper triangle of V makes A, the lower one B; ``left`` and ``right`` use one of them, so half of V; with scales its
    diagonal are the logarithms of what the singular values are multiplied by. "rows" is "right" between ``Q_C`` and ``Q_R``
    themselves, without the SVD; with another scale of V it is the library's ``coordinates="rotation"``.
    """

    core = None  # `PMSSCore` asks: it is not the library's own rotation

    def __init__(self, weight: Tensor, columns: Tensor, rows: Tensor, kind: str) -> None:
        super().__init__()
        q_c, t_c = torch.linalg.qr(columns.double())
        q_r, t_r = torch.linalg.qr(rows.double().T)
        core = q_c.T @ weight.double() @ q_r
        if kind == "rows":
            self.left = nn.Buffer(torch.linalg.solve_triangular(t_c, core, upper=True).float())
            self.right = nn.Buffer(torch.linalg.inv(t_r).T.contiguous().float())
            self.kind, self.unused = kind, len(core) * (len(core) + 1) // 2
            return
        p, s, z = torch.linalg.svd(core)
        self.left = nn.Buffer(torch.linalg.solve_triangular(t_c, p, upper=True).float())
        self.right = nn.Buffer(torch.linalg.solve_triangular(t_r, z.T, upper=True).T.float())
        self.values = nn.Buffer(s.float())
        self.kind = kind
        r = len(s)  # entries of V that do nothing: the diagonal, and the other triangle
        self.unused = (0 if "scales" in kind else r) + (r * (r - 1) // 2 if kind in ("left", "right") else 0)

    @override
    def forward(self, v: Tensor) -> Tensor:
        """U [r, r]."""
        if self.kind == "rows":
            lower = v.tril(-1)
            turned = cayley(lower - lower.T)
            return self.left @ (turned - torch.eye(len(v), device=v.device)) @ self.right
        core = self.values.diag()
        if "scales" in self.kind:
            core = core * v.diagonal().exp().diag()
        upper, lower = v.triu(1), v.tril(-1)
        if self.kind != "right":
            core = cayley(upper - upper.T) @ core
        if self.kind != "left":
            core = core @ cayley(lower - lower.T)
        return self.left @ (core - self.values.diag()) @ self.right


class RotatingCore(Callback):
    """Puts `RotatingFrame` into every converted layer before training."""

    def __init__(self, kind: str) -> None:
        if kind not in KINDS:
            raise ValueError(f"core={kind!r} is not known; choose one of {list(KINDS)}.")
        self.kind = kind

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for layer in pmss_layers(pl_module).values():
            rows, columns = layer.slices()
            layer.core.frame = RotatingFrame(layer.base_weight(), columns, rows, self.kind)  # type: ignore[assignment]
