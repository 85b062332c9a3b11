"""HiRA (Huang et al., ICLR 2025): ``W' = W (.) (1 + s B A)``, a Hadamard product with a low-rank matrix.

The change ``W (.) B A`` has a high rank although A and B are LoRA's. See `lightning_pmss.methods.hadamard` for the layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_pmss.layers.applied import AppliedLayer
from lightning_pmss.methods.config import AdapterConfig, ScaledConfig
from lightning_pmss.methods.documentation import inherit_options
from lightning_pmss.methods.hadamard import HadamardUpdate, hadamard, hadamard_applied
from lightning_pmss.methods.lora import LoRA, LoRAUpdate
from lightning_pmss.methods.method import Method, Shape


@inherit_options(AdapterConfig, ScaledConfig)
@dataclass(frozen=True)
class HiRAConfig(ScaledConfig):
    """Options of HiRA.

    Args:
        rank: Rows of A and columns of B.
        scale: Factor s of ``B A``.
        seed: Seed of A's start, from which each layer draws by its name.

    Raises:
        ValueError: See `AdapterConfig`.
    """

    method = "hira"
    rank: int = 32
    seed: int = 0

    def card(self) -> str:
        """The update, and what it is bound to."""
        return (
            "`W' = W (.) (1 + B A)`, entry by entry: both factors were trained (HiRA, ICLR 2025, with lightning-pmss). On other"
            " weights it is another change, and loading on them is refused."
        )

    def summary(self) -> str:
        """s."""
        return f"scale {self.scale:g}"


@dataclass(frozen=True)
class HiRAUpdate(HadamardUpdate, LoRAUpdate):
    """``W' = W (.) (1 + B A)``.

    Attributes:
        A: ``[r, in]``, float32 (float64 on a float64 base).
        B: ``[out, r]``, with the scale folded in.
    """

    def multiplier(self, rows: slice, dtype: torch.dtype) -> Tensor:
        return self.B[rows].to(dtype) @ self.A.to(dtype)

    def at(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return F.linear(F.embedding(ids, self.A.to(dtype).T), self.B.to(dtype))

    def bound(self, weight: Tensor) -> float:
        sizes = [torch.linalg.vector_norm(factor.double()) for factor in (self.A, self.B)]
        return float(weight.detach().abs().max()) * float(sizes[0]) * float(sizes[1])


class HiRA(LoRA):
    """LoRA's factors, multiplied into W."""

    config: HiRAConfig  # type: ignore[assignment]
    config_class = HiRAConfig  # type: ignore[assignment]
    update_class = HiRAUpdate

    def forward(self, layer: Any, x: Tensor) -> Tensor:
        """``base(x) + (W (.) B A) x``."""
        values: Mapping[str, Tensor] = layer.core(layer.scale)
        return hadamard(layer, x, values["A"], values["B"], _form, _pull)

    grouped, why_not_applied = Method.grouped, Method.why_not_applied  # not LoRA's

    def applied(self, layer: AppliedLayer, x: Tensor) -> Tensor:
        """See `hadamard_applied`."""
        return hadamard_applied(layer, x, HiRAUpdate)

    def kept_per_token(self, shape: Shape, rank: int) -> int:
        """x, which the gradients of A and B need."""
        return shape[1]


def _form(a: Tensor, b: Tensor) -> Tensor:
    return b @ a


def _pull(grad: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return b.T @ grad, grad @ a.T
