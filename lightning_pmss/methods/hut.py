"""HUT (Zhang, Zhou, Chen, arXiv 2409.13501), reconstructed: W is multiplied entry by entry by two small trained matrices.

The paper's formula reaches us only as ``W' = (M_A 1)^r (.) W (.) (1 M_B)^r`` in second-hand reviews. The exponent and the start
are not defined there, no code was published, and so this is a reading of it, chosen by what the reviews agree on: two trained
matrices of ``r (out + in)`` numbers around W, no product of them, and a cost that does not grow with r.

    tiled      M_A ``[out, r]`` is repeated along the columns of W, the transposed M_B ``[in, r]`` along its rows
    diagonal   one number per row and one per column, ``diag(a) W diag(b)``: this is HyperAdapt (arXiv 2509.18629), and tiled of
               rank 1

Trained are the deviations from one, ``M = 1 + left`` and ``1 + right``, from zero, so that the layer starts as the base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_pmss.layers.applied import AppliedLayer
from lightning_pmss.layers.products import compute_dtype
from lightning_pmss.methods.choices import one_of
from lightning_pmss.methods.config import AdapterConfig
from lightning_pmss.methods.documentation import inherit_options
from lightning_pmss.methods.hadamard import HadamardUpdate, hadamard, hadamard_applied
from lightning_pmss.methods.method import Kind, Method, Shape, Spec, why_misshapen


@inherit_options(AdapterConfig)
@dataclass(frozen=True)
class HUTConfig(AdapterConfig):
    """Options of HUT, a reconstruction (`lightning_pmss.methods.hut`).

    Args:
        rank: Width of the tiles; the last one is cut where it does not divide a side of W. The diagonal form ignores it.
        form: ``"tiled"``, or ``"diagonal"`` (HyperAdapt): one factor per row and one per column.

    Raises:
        ValueError: See `AdapterConfig`.
    """

    method = "hut"
    form: str = field(default="tiled", metadata=one_of("tiled", "diagonal"))

    def card(self) -> str:
        """The update, and what it is bound to."""
        return (
            "`W' = W (.) (1 + left) (.) (1 + right)`, entry by entry, with both repeated to the shape of W: both were trained"
            " (a reconstruction of HUT, arXiv 2409.13501, with lightning-pmss). On other weights it is another change, and"
            " loading on them is refused."
        )

    def summary(self) -> str:
        """The form."""
        return self.form

    def meaning(self) -> dict[str, Any]:
        """The form."""
        return {"form": self.form}


@dataclass(frozen=True)
class HUTUpdate(HadamardUpdate):
    """``W'[i, j] = W[i, j] (1 + left[i, j mod r]) (1 + right[j, i mod r])``.

    Attributes:
        left: ``[out, r]``, float32 (float64 on a float64 base); r at most out and in.
        right: ``[in, r]``. Engines that shard rows keep both in parts of equal size, whatever the rank.
    """

    left: Tensor
    right: Tensor

    @property
    def rank(self) -> int:
        return self.left.shape[1]

    @classmethod
    def why_not(cls, shape: Shape, tensors: Mapping[str, Tensor]) -> str | None:
        r = tensors["right"].shape[-1]
        if reason := why_misshapen(tensors, {"left": (shape[0], r), "right": (shape[1], r)}):
            return reason
        return None if 0 < r <= min(shape) else f"right has {r} columns. W is {list(shape)}"

    @classmethod
    def weighted(cls, updates: Sequence[tuple[float, HUTUpdate]]) -> HUTUpdate:
        raise ValueError("the sum of HUT adapters is no HUT adapter: each multiplies W. Combine LoRA or PMSS adapters.")

    def multiplier(self, rows: slice, dtype: torch.dtype) -> Tensor:
        left, right = self.left.to(dtype), self.right.to(dtype)
        of_row = torch.arange(len(left), device=left.device)[rows] % right.shape[1]
        return _product(_tiled(left[rows], len(right)), right[:, of_row].T)

    def at(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        left, right = self.left.to(dtype), self.right.to(dtype)
        of_column = F.embedding(ids % left.shape[1], left.T)
        of_row = torch.arange(len(left), device=left.device) % right.shape[1]
        return _product(of_column, F.embedding(ids, right).index_select(-1, of_row))

    def bound(self, weight: Tensor) -> float:
        left, right = (float(part.double().abs().max()) for part in (self.left, self.right))
        return float(weight.detach().abs().max()) * (left + right + left * right)


class HUT(Method[HUTConfig]):
    """Factors of the rows and columns of W."""

    config_class = HUTConfig
    update_class = HUTUpdate
    variants = ({"form": "diagonal"},)

    def specs(self, shape: Shape, rank: int) -> dict[str, Spec]:
        """Both matrices."""
        return {"left": Spec((shape[0], rank), Kind.TRAINED), "right": Spec((shape[1], rank), Kind.TRAINED)}

    def rank_of(self, shape: Shape, rank: int) -> int:
        """1 for the diagonal form."""
        return 1 if self.config.form == "diagonal" else super().rank_of(shape, rank)

    def values(self, tensors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
        """As they are."""
        return {"left": tensors["left"].clone(), "right": tensors["right"].clone()}

    def numbers(self, update: HUTUpdate, frozen: Mapping[str, Tensor], scale: float, name: str) -> dict[str, Tensor]:
        """As they are."""
        return {"left": update.left.clone(), "right": update.right.clone()}

    def fitted(self, weight: Tensor, update: HUTUpdate, rank: int, scale: float, name: str) -> dict[str, Tensor]:
        """Of its own rank: tiles of another width cannot be filled up."""
        return self.numbers(update.to(weight.device), {}, scale, name)

    def forward(self, layer: Any, x: Tensor) -> Tensor:
        """Diagonal: scale x, then y, without W'; the scaled numbers are rounded to the dtype in which the base computes."""
        values: Mapping[str, Tensor] = layer.core(layer.scale)
        left, right = values["left"], values["right"]
        if right.shape[1] > 1:
            return hadamard(layer, x, left, right, _form, _pull)
        dtype = compute_dtype(x)
        y: Tensor = layer.base((x * (1 + right[:, 0])).to(dtype))
        unbiased = y if layer.bias is None else y - layer.bias
        return y + (unbiased * left[:, 0]).to(y.dtype)

    def applied(self, layer: AppliedLayer, x: Tensor) -> Tensor:
        """See `hadamard_applied`."""
        return hadamard_applied(layer, x, HUTUpdate)

    def kept_per_token(self, shape: Shape, rank: int) -> int:
        """x, which both gradients need; in the diagonal form y also."""
        return shape[1] + (shape[0] if rank == 1 else 0)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """``(1 + left) (1 + right) - 1``, without the rounding of a small one beside the 1."""
    return (left * right).add_(left).add_(right)


def _tiled(part: Tensor, size: int) -> Tensor:
    """A matrix repeated beside itself up to a number of columns, where the last copy is cut."""
    return part @ _tile(part, size)


def _tile(like: Tensor, size: int) -> Tensor:
    """``[r, size]``, identities beside each other. A product with it is faster than copies of pieces of r numbers."""
    rank = like.shape[1]
    found = like.new_zeros(rank, size)
    at = torch.arange(size, device=like.device)
    found[at % rank, at] = 1
    return found


def _form(left: Tensor, right: Tensor) -> Tensor:
    return _product(_tiled(left, len(right)), _tile(right, len(left)).T @ right.T)


def _pull(grad: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    tile, across = _tile(left, len(right)), _tile(right, len(left))
    of_left = (across.T @ right.T).add_(1).mul_(grad)
    of_right = (left @ tile).add_(1).mul_(grad)
    return of_left @ tile.T, (across @ of_right).T
