"""MiSS (Kang and Yin, arXiv 2409.15371, once called Bone): ``y = W x + D^T s``, where s sums the blocks of x.

The input is cut into blocks of r numbers, the last one filled up with zeros, and s ``[r]`` is their sum. Only D is trained. As
a LoRA it is ``A = [I I ... I]``, cut to the input's width, and ``B = D^T``, exactly. A is never made: the sum is a view and a
sum, of which the backward pass needs nothing, so that only s is kept per token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_pmss.layers.applied import AppliedLayer
from lightning_pmss.layers.convertible import canonical_shape
from lightning_pmss.layers.expert_stack import GroupedLayer
from lightning_pmss.layers.operators import why_no_dropout
from lightning_pmss.layers.products import compute_dtype, dropped
from lightning_pmss.methods.config import AdapterConfig
from lightning_pmss.methods.documentation import inherit_options
from lightning_pmss.methods.method import Factors, Kind, Method, Shape, Spec, Update


@inherit_options(AdapterConfig)
@dataclass(frozen=True)
class MiSSConfig(AdapterConfig):
    """Options of MiSS.

    Args:
        rank: Rows of D, the width of a block of the input; clipped to the layer's input.
        mini_rank: Columns of D, repeated along the output, which they must divide; None: one for each output.
        dropout: Dropout probability on the input of the sum.

    Raises:
        ValueError: See `AdapterConfig`.
    """

    method = "miss"
    rank: int = 64
    mini_rank: int | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        mini = self.mini_rank
        if mini is not None and (isinstance(mini, bool) or not isinstance(mini, int) or mini < 1):
            raise ValueError(f"mini_rank={mini!r} must be a whole number of at least 1, or None.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r} must lie in [0, 1).")

    def card(self) -> str:
        """D."""
        return "`W' = W + D^T [I I ... I]`: D was trained (MiSS, arXiv 2409.15371, with lightning-pmss)."

    def summary(self) -> str:
        """mini_rank."""
        return "one column of D for each output" if self.mini_rank is None else f"mini_rank {self.mini_rank}"

    @property
    def input_dropout(self) -> float:
        """See `AdapterConfig`."""
        return self.dropout

    def meaning(self) -> dict[str, Any]:
        """mini_rank says what a column of D is for."""
        return {"mini_rank": self.mini_rank}


@dataclass(frozen=True)
class MiSSUpdate(Update):
    """``W'[o, i] = W[o, i] + D[i mod r, o mod m]``.

    Attributes:
        D: ``[r, m]``, where m divides the output, float32 (float64 on a float64 base).
    """

    D: Tensor

    @property
    def rank(self) -> int:
        return len(self.D)

    @classmethod
    def why_not(cls, shape: Shape, tensors: Mapping[str, Tensor]) -> str | None:
        d = tensors["D"]
        fits = d.dim() == 2 and 0 < d.shape[0] <= shape[1] and d.shape[1] > 0 and shape[0] % d.shape[1] == 0
        if d.dtype not in (torch.float32, torch.float64) or not fits:
            return (
                f"D is {d.dtype} {list(d.shape)}; it must be float32 or float64, with up to {shape[1]} rows and a number of"
                f" columns that divides {shape[0]}"
            )
        return None

    @classmethod
    def weighted(cls, updates: Sequence[tuple[float, MiSSUpdate]]) -> MiSSUpdate:
        rows, columns = (math.lcm(*(u.D.shape[dim] for _, u in updates)) for dim in (0, 1))
        tiled = [weight * u.D.repeat(rows // u.D.shape[0], columns // u.D.shape[1]) for weight, u in updates]
        return cls(torch.stack(tiled).sum(0))

    def factors(self, weight: Tensor, dtype: torch.dtype) -> Factors:
        d = self.D.to(dtype)
        eye = torch.eye(len(d), dtype=dtype, device=d.device)
        tiles = -(-weight.shape[1] // len(d))
        return Factors(eye.repeat(1, tiles)[:, : weight.shape[1]], d.T.repeat(weight.shape[0] // d.shape[1], 1))


class MiSS(Method[MiSSConfig]):
    """D trained, from zero."""

    config_class = MiSSConfig
    update_class = MiSSUpdate
    variants = ({"mini_rank": 8},)

    def specs(self, shape: Shape, rank: int) -> dict[str, Spec]:
        """D."""
        return {"D": Spec((rank, self.config.mini_rank or shape[0]), Kind.TRAINED)}

    def rank_of(self, shape: Shape, rank: int) -> int:
        """Blocks are no wider than the input; the output sets no bound."""
        return min(rank, shape[1])

    def refuse(self, layer: nn.Module, name: str) -> None:
        """Layers whose output cannot be divided by ``mini_rank``."""
        out, mini = canonical_shape(layer)[0], self.config.mini_rank
        if mini is not None and out % mini:
            fits = ", ".join(str(n) for n in range(1, out + 1) if out % n == 0)
            raise ValueError(
                f"`{name}` has {out} outputs, which mini_rank={mini} does not divide. Type one of {fits}, leave mini_rank"
                " out, or exclude the module."
            )

    def values(self, tensors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
        """D as it is."""
        return {"D": tensors["D"].clone()}

    def numbers(self, update: MiSSUpdate, frozen: Mapping[str, Tensor], scale: float, name: str) -> dict[str, Tensor]:
        """D as it is."""
        return {"D": update.D.clone()}

    def fitted(self, weight: Tensor, update: MiSSUpdate, rank: int, scale: float, name: str) -> dict[str, Tensor]:
        """D of its own rank: blocks of another width cannot be filled up."""
        return self.numbers(update.to(weight.device), {}, scale, name)

    def forward(self, layer: Any, x: Tensor) -> Tensor:
        """``base(x) + s D``, whose product is done in the dtype in which the base computes."""
        y = layer.base(x)
        d = layer.core(layer.scale)["D"]
        h = dropped(x, self.config.dropout, layer.training)
        dtype = compute_dtype(x)
        change = block_sum(h, len(d)).to(dtype) @ d.to(dtype)
        return (y.unflatten(-1, (-1, d.shape[1])) + change.unsqueeze(-2).to(y.dtype)).flatten(-2)

    def grouped(self, layer: GroupedLayer, x: Tensor) -> Tensor:
        """The same of all experts: the sum of the blocks is that of each token, whatever its expert."""
        y, d = layer.base(x), layer.values()["D"]
        h = dropped(x, self.config.dropout, layer.training)
        change = layer.linear(block_sum(h, d.shape[1]), d.mT)
        return (y.unflatten(-1, (-1, d.shape[2])) + change.unsqueeze(-2)).flatten(-2)

    def applied(self, layer: AppliedLayer, x: Tensor) -> Tensor:
        """Of an embedding, a row of D for each id; of a convolution, one to r channels, whose kernel is ``[I I ... I]``."""
        values = layer.values()
        if not layer.looks_up:
            return layer.changed(dropped(x, self.config.dropout, layer.training), values, self.update_class)
        y, d = layer.base(x), values["D"]
        change = F.embedding(x % len(d), d).to(y.dtype)
        return (y.unflatten(-1, (-1, d.shape[1])) + change.unsqueeze(-2)).flatten(-2)

    def why_not_applied(self, layer: nn.Module) -> str | None:
        """Ids cannot be dropped."""
        return why_no_dropout(layer, self.config.dropout)

    def kept_per_token(self, shape: Shape, rank: int) -> int:
        """s ``[r]``."""
        return rank


def block_sum(x: Tensor, width: int) -> Tensor:
    """The sum of the blocks of x ``[..., in]``: ``[..., width]``; the last one is filled up with zeros."""
    return F.pad(x, (0, -x.shape[-1] % width)).unflatten(-1, (-1, width)).sum(-2)
