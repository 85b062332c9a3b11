"""LoRA (Hu et al., arXiv 2106.09685): ``W' = W + (alpha / r) B A`` with both factors trained."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_pmss.layers.applied import AppliedLayer
from lightning_pmss.layers.expert_stack import GroupedLayer
from lightning_pmss.layers.operators import why_no_dropout
from lightning_pmss.layers.products import compute_dtype, dropped
from lightning_pmss.methods.config import AdapterConfig
from lightning_pmss.methods.documentation import inherit_options
from lightning_pmss.methods.method import Factors, Kind, Method, Shape, Spec, Update, why_misshapen


@inherit_options(AdapterConfig)
@dataclass(frozen=True)
class LoRAConfig(AdapterConfig):
    """Options of LoRA.

    Args:
        rank: Rows of A and columns of B.
        alpha: The update is ``alpha / rank`` times ``B A``.
        rank_stabilized: Scale by ``alpha / sqrt(rank)`` (rsLoRA, arXiv 2312.03732): one learning rate then suits all ranks.
        dropout: Dropout probability on the input of A.
        seed: Seed of A's start, from which each layer draws by its name.

    Raises:
        ValueError: See `AdapterConfig`.
    """

    method = "lora"
    alpha: float = 16.0
    rank_stabilized: bool = False
    dropout: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_factor("alpha", self.alpha)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r} must lie in [0, 1).")

    def scale_of(self, rank: int, shape: tuple[int, int]) -> float:
        """``alpha / rank``, or ``alpha / sqrt(rank)``."""
        return self.alpha / (rank**0.5 if self.rank_stabilized else rank)

    def card(self) -> str:
        """Both factors."""
        return "`W' = W + B A`: both factors were trained (LoRA, arXiv 2106.09685, with lightning-pmss)."

    def summary(self) -> str:
        """alpha, and whether it is divided by the root of the rank."""
        return f"alpha {self.alpha:g}{', rank-stabilised' if self.rank_stabilized else ''}"

    @property
    def input_dropout(self) -> float:
        """See `AdapterConfig`."""
        return self.dropout

    def meaning(self) -> dict[str, Any]:
        """The factor of B A."""
        return {"alpha": self.alpha, "rank_stabilized": self.rank_stabilized}


@dataclass(frozen=True)
class LoRAUpdate(Update):
    """``W' = W + B A``.

    Attributes:
        A: ``[r, in]``, float32 (float64 on a float64 base).
        B: ``[out, r]``, with the factor ``alpha / r`` folded in.
    """

    A: Tensor
    B: Tensor

    @property
    def rank(self) -> int:
        return len(self.A)

    @classmethod
    def why_not(cls, shape: Shape, tensors: Mapping[str, Tensor]) -> str | None:
        a, b = tensors["A"], tensors["B"]
        return why_misshapen(tensors, {"A": (b.shape[-1], shape[1]), "B": (shape[0], len(a))})

    @classmethod
    def weighted(cls, updates: Sequence[tuple[float, LoRAUpdate]]) -> LoRAUpdate:
        return cls(torch.cat([u.A for _, u in updates]), torch.cat([weight * u.B for weight, u in updates], 1))

    def trimmed(self) -> Self:
        used = self.A.ne(0).any(1) & self.B.ne(0).any(0)  # the others fill a layer of a larger rank up
        used[0] |= not bool(used.any())  # never trained: one row stands for it
        return type(self)(self.A[used], self.B[:, used])

    def narrowed(self, shape: Shape) -> Self:
        if self.rank <= min(shape):
            return self
        a, b, _ = lora_pair(Factors(self.A.double(), self.B.double()), min(shape))
        return replace(self, A=a.to(self.A.dtype).contiguous(), B=b.to(self.B.dtype).contiguous())

    def factors(self, weight: Tensor, dtype: torch.dtype) -> Factors | None:
        return Factors(self.A.to(dtype), self.B.to(dtype))


def lora_pair(factors: Factors, rank: int | None = None) -> tuple[Tensor, Tensor, float | None]:
    """Return ``lora_A [k, in]`` and ``lora_B [out, k]``, whose product ``lora_B @ lora_A`` is the update.

    Args:
        factors: Factors of the update, float64.
        rank: Largest k. If it is smaller than the factors' rank, the result is the best approximation (Eckart and Young), with
            the square root of the singular values in each factor.

    Returns:
        Both factors in float64, and the share of the update's Frobenius norm that was cut off; None if nothing was.
    """
    a, b = factors
    if rank is None or rank >= len(a):
        return a, b, None
    q_b, t_b = torch.linalg.qr(b)
    q_a, t_a = torch.linalg.qr(a.T)
    left, singular, right = torch.linalg.svd(t_b @ t_a.T)
    root = singular[:rank].sqrt()
    whole, cut = float(torch.linalg.vector_norm(singular)), float(torch.linalg.vector_norm(singular[rank:]))
    error = cut / whole if whole > 0 else 0.0
    return root[:, None] * (right[:rank] @ q_a.T), (q_b @ left[:, :rank]) * root, error


class LoRA(Method[LoRAConfig]):
    """Both factors trained, B from zero."""

    config_class = LoRAConfig
    update_class = LoRAUpdate

    def specs(self, shape: Shape, rank: int) -> dict[str, Spec]:
        """A and B."""
        return {"A": Spec((rank, shape[1]), Kind.TRAINED), "B": Spec((shape[0], rank), Kind.TRAINED)}

    def start(self, shape: Shape, rank: int, name: str) -> dict[str, Tensor]:
        """A as ``nn.Linear`` starts (and peft's), uniform within ``1 / sqrt(in)``; B zero."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.config.seed}:{name}".encode()))
        bound = shape[1] ** -0.5
        a = torch.empty(rank, shape[1]).uniform_(-bound, bound, generator=generator)
        return {"A": a, "B": torch.zeros(shape[0], rank)}

    def values(self, tensors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
        """A as it is, B scaled."""
        return {"A": tensors["A"].clone(), "B": scale * tensors["B"]}

    def numbers(self, update: LoRAUpdate, frozen: Mapping[str, Tensor], scale: float, name: str) -> dict[str, Tensor]:
        """A as it is, B divided by the scale."""
        b = update.B / scale
        if not bool(b.isfinite().all()):
            kind = str(b.dtype).removeprefix("torch.")
            raise ValueError(
                f"`{name}`: with scale {scale:.3g} its update needs trained numbers that {kind} cannot hold. Load it with a"
                " larger one (LoRA: an alpha near its rank)."
            )
        return {"A": update.A.clone(), "B": b}

    def fitted(self, weight: Tensor, update: LoRAUpdate, rank: int, scale: float, name: str) -> dict[str, Tensor]:
        """Filled up with zeros, which get no gradient: the update keeps its own rank."""
        assert update.rank <= rank  # negative padding would cut
        more = rank - update.rank
        own = self.numbers(update.to(weight.device), {}, scale, name)
        return {"A": F.pad(own["A"], (0, 0, 0, more)), "B": F.pad(own["B"], (0, more))}

    def forward(self, layer: Any, x: Tensor) -> Tensor:
        """``base(x) + B (A x)``, whose products are done in the dtype in which the base computes."""
        y: Tensor = layer.base(x)
        dtype = compute_dtype(x)
        values = layer.core(layer.scale)
        h = dropped(x.to(dtype), self.config.dropout, layer.training)
        return y + F.linear(F.linear(h, values["A"].to(dtype)), values["B"].to(dtype)).to(y.dtype)

    def grouped(self, layer: GroupedLayer, x: Tensor) -> Tensor:
        """The same of all experts."""
        y = layer.base(x)
        values = layer.values()
        h = dropped(x.to(y.dtype), self.config.dropout, layer.training)
        return y + layer.linear(layer.linear(h, values["A"]), values["B"])

    def applied(self, layer: AppliedLayer, x: Tensor) -> Tensor:
        """The same by a convolution to r channels and one of 1 x 1; of an embedding, A is looked up."""
        y = layer.base(x)
        values = layer.values()
        h = layer.linear(dropped(x, self.config.dropout, layer.training), values["A"])
        return y + layer.mixed(h, values["B"]).to(y.dtype)

    def why_not_applied(self, layer: nn.Module) -> str | None:
        """Ids cannot be dropped."""
        return why_no_dropout(layer, self.config.dropout)

    def kept_per_token(self, shape: Shape, rank: int) -> int:
        """x, which the gradient of A needs, and ``A x``."""
        return shape[1] + rank
