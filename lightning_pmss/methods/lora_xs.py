"""LoRA-XS (Bałazy et al., arXiv 2405.17604): ``W' = W + s B R A``, of which only the square core R is trained.

A and B are the first singular values and vectors of W, ``W ~ U S V^T``: ``A = S V^T [r, in]``, ``B = U [out, r]``. (The paper
writes W transposed and swaps their letters.) They are exact, computed in float64 from the smaller Gram matrix, with the signs
fixed; the original uses a randomised decomposition.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_pmss.layers.products import compute_dtype
from lightning_pmss.methods.choices import one_of
from lightning_pmss.methods.config import AdapterConfig, ScaledConfig
from lightning_pmss.methods.documentation import inherit_options
from lightning_pmss.methods.given import Given
from lightning_pmss.methods.method import Factors, Kind, Method, Shape, Spec, Update, why_misshapen
from lightning_pmss.methods.skeleton import read_derived

_RANK = 1e-6  # of the largest singular value: what is smaller is the rounding of a float32 weight
_SIGMA = 1e-5  # of the paper's start
_LOST = 1e-3  # of the singular vectors of a file, when they are expressed in those of a layer


@inherit_options(AdapterConfig, ScaledConfig)
@dataclass(frozen=True)
class LoRAXSConfig(ScaledConfig):
    """Options of LoRA-XS.

    Args:
        rank: Singular vectors per layer, at most as many as W's rank; ``rank^2`` numbers are trained.
        scale: Factor s of ``B R A``; the paper's ``lora_alpha / r``.
        init: Start of R: ``"zero"``, or the paper's ``"normal"`` with a standard deviation of 1e-5.
        seed: Seed of a normal start, from which each layer draws by its name.
        skeleton_file: A file of singular vectors that ``select --method lora_xs`` made, to use instead of computing them.

    Raises:
        ValueError: See `AdapterConfig`.
    """

    method = "lora_xs"
    per_matrix = ("rank",)
    rank: int = 64
    init: str = field(default="zero", metadata=one_of("zero", "normal"))
    seed: int = 0
    skeleton_file: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.skeleton_file is not None:
            object.__setattr__(self, "skeleton_file", str(self.skeleton_file))

    def card(self) -> str:
        """The update, and what it is bound to."""
        return (
            "`W' = W + B R A`: R was trained, between the first singular vectors of the base's own weights (LoRA-XS, arXiv"
            " 2405.17604, with lightning-pmss). Loading on other weights is refused."
        )

    def summary(self) -> str:
        """s and the start."""
        return f"scale {self.scale:g}, init {self.init}"


@dataclass(frozen=True)
class LoRAXSUpdate(Update):
    """``W' = W + B R A``.

    The file holds all three, so that training goes on with the same numbers on every machine. Checkpoints hold R alone and
    compute A and B from W again; another base is therefore refused, by a fingerprint of all of W.

    Attributes:
        A: ``[r, in]``, float32 (float64 on a float64 base).
        B: ``[out, r]``.
        R: ``[r, r]``, with the scale folded in.
    """

    bound_to_base = True

    A: Tensor
    B: Tensor
    R: Tensor

    @property
    def rank(self) -> int:
        return len(self.R)

    @classmethod
    def why_not(cls, shape: Shape, tensors: Mapping[str, Tensor]) -> str | None:
        r = len(tensors["A"])
        return why_misshapen(tensors, {"A": (r, shape[1]), "B": (shape[0], r), "R": (r, r)})

    @classmethod
    def reads(cls, weight: Tensor, indices: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        return (weight,)

    @classmethod
    def weighted(cls, updates: Sequence[tuple[float, LoRAXSUpdate]]) -> LoRAXSUpdate:
        first = updates[0][1]
        if all(torch.equal(u.A, first.A) and torch.equal(u.B, first.B) for _, u in updates):
            return cls(first.A, first.B, torch.stack([weight * u.R for weight, u in updates]).sum(0))
        a, b = torch.cat([u.A for _, u in updates]), torch.cat([u.B for _, u in updates], 1)
        return cls(a, b, torch.block_diag(*(weight * u.R for weight, u in updates)))

    def trimmed(self) -> LoRAXSUpdate:
        used = self.A.ne(0).any(1)  # the others fill a layer of a larger rank up
        return LoRAXSUpdate(self.A[used], self.B[:, used], self.R[used][:, used])

    def factors(self, weight: Tensor, dtype: torch.dtype) -> Factors:
        return Factors(self.A.to(dtype), self.B.to(dtype) @ self.R.to(dtype))


class LoRAXS(Method[LoRAXSConfig]):
    """A trained core between frozen singular vectors."""

    config_class = LoRAXSConfig
    update_class = LoRAXSUpdate
    doing = "computing singular vectors"
    derived = "singular vectors"

    def specs(self, shape: Shape, rank: int) -> dict[str, Spec]:
        """R, A and B."""
        return {
            "R": Spec((rank, rank), Kind.TRAINED),
            "A": Spec((rank, shape[1]), Kind.FROZEN),
            "B": Spec((shape[0], rank), Kind.FROZEN),
        }

    def start(self, shape: Shape, rank: int, name: str) -> dict[str, Tensor]:
        """Zero, or nearly."""
        if self.config.init == "zero":
            return super().start(shape, rank, name)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.config.seed}:{name}".encode()))
        return {"R": _SIGMA * torch.randn(rank, rank, generator=generator)}

    def derive(self, weight: Tensor | None, rank: int, name: str, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The singular vectors of a file, or those of W."""
        if {"A", "B"} <= given.keys():
            return dict(given)
        assert weight is not None
        a, b = singular_factors(weight, rank, name)
        return {"A": a, "B": b}

    def read_given(self) -> Given | None:
        """``skeleton_file``."""
        file = self.config.skeleton_file
        return None if file is None else read_derived(file, self.config.method, {"A": 2, "B": 2})

    def why_underived(self, given: Given | None, name: str) -> str | None:
        """Singular vectors need W, or a file that has them."""
        if given is not None and {"A", "B"} <= given.layers[name].tensors.keys():
            return None
        return "is on the meta device, and its singular vectors need W; load the weights first or give skeleton_file=."

    def for_several(self) -> LoRAXSConfig:
        """Each adapter has its own singular vectors."""
        return replace(self.config, skeleton_file=None)

    def values(self, tensors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
        """A and B as they are, R scaled."""
        return {"A": tensors["A"].clone(), "B": tensors["B"].clone(), "R": scale * tensors["R"]}

    def numbers(self, update: LoRAXSUpdate, frozen: Mapping[str, Tensor], scale: float, name: str) -> dict[str, Tensor]:
        """R divided by the scale; expressed in the layer's own singular vectors where the file has others of the same span."""
        r = update.R
        a, b = frozen["A"], frozen["B"]
        if not (torch.equal(a, update.A) and torch.equal(b, update.B)):
            sides = []
            for own, theirs in ((b.double(), update.B.double()), (a.double().T, update.A.double().T)):
                side = torch.linalg.pinv(own) @ theirs
                if float(torch.dist(own @ side, theirs)) > _LOST * float(torch.linalg.vector_norm(theirs)):
                    raise ValueError(
                        f"`{name}` has other singular vectors than the adapter. Load the adapter into a model that is not"
                        " converted: it then uses the adapter's own."
                    )
                sides.append(side)
            r = (sides[0] @ r.double() @ sides[1].T).to(r.dtype)
        r = r / scale
        if not bool(r.isfinite().all()):
            kind = str(r.dtype).removeprefix("torch.")
            raise ValueError(
                f"`{name}`: with scale {scale:.3g} its update needs trained numbers that {kind} cannot hold. Load it with a"
                " scale near 1."
            )
        return {"R": r.clone()}

    def fitted(self, weight: Tensor, update: LoRAXSUpdate, rank: int, scale: float, name: str) -> dict[str, Tensor]:
        """Filled up with zeros, which get no gradient: the update keeps its own rank."""
        update, more = update.to(weight.device), rank - update.rank
        own = self.numbers(update, {"A": update.A, "B": update.B}, scale, name)
        a, b = F.pad(update.A, (0, 0, 0, more)), F.pad(update.B, (0, more))
        return {"R": F.pad(own["R"], (0, more, 0, more)), "A": a, "B": b}

    def forward(self, layer: Any, x: Tensor) -> Tensor:
        """``base(x) + B (R (A x))``, whose products are done in the dtype in which the base computes."""
        y = layer.base(x)
        dtype = compute_dtype(x)
        values = {name: t.to(dtype) for name, t in layer.core(layer.scale).items()}
        h = F.linear(F.linear(x.to(dtype), values["A"]), values["R"])
        return y + F.linear(h, values["B"]).to(y.dtype)

    def kept_per_token(self, shape: Shape, rank: int) -> int:
        """``A x``, which the gradient of R needs."""
        return rank


@torch.no_grad()
def singular_factors(weight: Tensor, rank: int, name: str) -> tuple[Tensor, Tensor]:
    """``S V^T [r, in]`` and ``U [out, r]`` of W ``[out, in]``, float64; the largest entry of each column of U is positive.

    The cost is that of one product and one symmetric eigenvalue problem of the smaller side in float64: with a side of 4096
    about half a minute of one CPU core.

    Raises:
        ValueError: W is not finite, or has a smaller rank.
    """
    w = weight.double()
    wide = w.shape[0] <= w.shape[1]
    gram = w @ w.T if wide else w.T @ w
    if not bool(gram.isfinite().all()):
        raise ValueError(f"`{name}`: its weight has NaN or infinite values, so it has no singular vectors.")
    squares, vectors = torch.linalg.eigh(gram)  # ascending
    known = int((squares > _RANK**2 * squares[-1]).sum())
    if known < rank:
        raise ValueError(
            f"`{name}`: its weight has the rank {known}, and {rank} singular vectors are asked for. Type a smaller rank, or an"
            " entry in rank_pattern, or exclude the layer."
        )
    vectors = vectors[:, -rank:].flip(1)
    u = vectors if wide else F.normalize(w @ vectors, dim=0)
    largest = u.abs().argmax(0, keepdim=True)
    u = u * u.gather(0, largest).sign()
    return (u.T @ w).contiguous(), u.contiguous()
