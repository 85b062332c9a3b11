"""BAT, block affine transformation (Kang, arXiv 2409.15371v1): ``W' = W (I + B) + B`` in blocks of r x r, with B trained.

With the blocks ``W_ij`` of W, i along the output and j along the input, and one trained ``B [r, r]`` for each i or each j::

    form="column"   W'_ij = W_ij (I + B_i) + B_i     as peft's ``MissConfig(init_weights="bat")``
    form="row"      W'_ij = W_ij (I + B_j) + B_j     as RWKV-PEFT's

Where r does not divide a side of W, the last blocks are filled up with zeros and the result is cut, as MiSS does with x.

The row form needs no W': with ``u_j = B_j x_j`` the layer gives ``W (x + u)``, plus the sum of the ``u_j`` in every block of
the output. The column form makes W' in the forward pass, and again in the backward pass instead of keeping it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lightning_pmss.layers.products import compute_dtype
from lightning_pmss.layers.quantised import SliceReader, dequantised
from lightning_pmss.methods.choices import one_of
from lightning_pmss.methods.config import AdapterConfig
from lightning_pmss.methods.documentation import inherit_options
from lightning_pmss.methods.formed import formed_forward
from lightning_pmss.methods.method import ALL, Kind, Method, Shape, Spec, Update

FORMS = ("column", "row")


@inherit_options(AdapterConfig)
@dataclass(frozen=True)
class BATConfig(AdapterConfig):
    """Options of BAT.

    Args:
        rank: Rows and columns of a block; clipped to the smaller side of a layer, which the report says. It need not divide a
            side.
        form: ``"column"``: one B for each block of the output, as in peft. ``"row"``: one for each block of the input, as in
            RWKV-PEFT; W' is then never made.

    Raises:
        ValueError: See `AdapterConfig`.
    """

    method = "bat"
    rank: int = 64
    form: str = field(default="column", metadata=one_of(*FORMS))

    def card(self) -> str:
        """The update, and what it is bound to."""
        of = "output" if self.form == "column" else "input"
        return (
            f"`W' = W (I + B) + B` in blocks, with one B for each block of the {of}, was trained (BAT, arXiv 2409.15371, with"
            " lightning-pmss). It multiplies the base's own weights, and loading on others is refused."
        )

    def summary(self) -> str:
        """form."""
        return f"form {self.form}"

    def meaning(self) -> dict[str, Any]:
        """form says which blocks a B is for."""
        return {"form": self.form}


@dataclass(frozen=True)
class BATUpdate(Update):
    """``W'_ij = W_ij (I + B_i) + B_i``.

    Attributes:
        B: ``[blocks r, r]``: the blocks below each other, float32 (float64 on a float64 base).
    """

    bound_to_base = True
    side: ClassVar[int] = 0
    """Of W, whose blocks have a B each."""

    B: Tensor

    @property
    def rank(self) -> int:
        return self.B.shape[1]

    @classmethod
    def why_not(cls, shape: Shape, tensors: Mapping[str, Tensor]) -> str | None:
        b, side = tensors["B"], shape[cls.side]
        fits = b.dim() == 2 and 0 < b.shape[1] <= min(shape) and b.shape[0] == side + -side % b.shape[1]
        if b.dtype not in (torch.float32, torch.float64) or not fits:
            return (
                f"B is {b.dtype} {list(b.shape)}; it must be float32 or float64, with r columns and as many rows as blocks of r"
                f" that cover {side}. W is {list(shape)}"
            )
        return None

    @classmethod
    def reads(cls, weight: Tensor, indices: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        return (weight,)

    @classmethod
    def weighted(cls, updates: Sequence[tuple[float, BATUpdate]]) -> BATUpdate:
        if len(ranks := {u.rank for _, u in updates}) > 1:
            raise ValueError(f"BAT of ranks {sorted(ranks)} has no sum that is BAT; combine adapters of one rank.")
        return cls(torch.stack([weight * u.B for weight, u in updates]).sum(0))

    def delta(self, weight: Tensor, rows: slice = ALL, dtype: torch.dtype | None = None) -> Tensor:
        r = self.rank
        start, stop, _ = rows.indices(len(weight))
        first, end = start - start % r, stop + -stop % r
        dtype = dtype or weight.dtype
        return column_change(weight[first:end].to(dtype), self.B[first:end].to(dtype))[start - first : stop - first]

    def bound(self, weight: Tensor) -> float:
        b = float(torch.linalg.vector_norm(self.B.double()))
        return (float(torch.linalg.vector_norm(weight, dtype=torch.float64)) + 1) * b


@dataclass(frozen=True)
class BATRowUpdate(BATUpdate):
    """``W'_ij = W_ij (I + B_j) + B_j``; B as in `BATUpdate`."""

    side = 1

    def delta(self, weight: Tensor, rows: slice = ALL, dtype: torch.dtype | None = None) -> Tensor:
        start, stop, _ = rows.indices(len(weight))
        part, blocks = (
            weight[rows].to(dtype or weight.dtype),
            self.B.to(dtype or weight.dtype).unflatten(0, (-1, self.rank)),
        )
        within = torch.arange(start, stop, device=blocks.device) % self.rank
        cut = F.pad(part, (0, -part.shape[1] % self.rank)).unflatten(1, (-1, self.rank))
        change = torch.einsum("ojk,jkl->ojl", cut, blocks) + blocks[:, within].transpose(0, 1)
        return change.flatten(1)[:, : part.shape[1]]


def in_blocks(weight: Tensor, r: int) -> Tensor:
    """W ``[out, in]``, filled up with zeros, as ``[out blocks, r, in blocks, r]``."""
    out, inp = weight.shape
    filled = F.pad(weight, (0, -inp % r, 0, -out % r)) if inp % r or out % r else weight
    return filled.reshape(-1, r, filled.shape[1] // r, r)


def column_change(weight: Tensor, b: Tensor) -> Tensor:
    """``W' - W`` of the column form, from rows of W ``[out, in]`` and their B ``[blocks r, r]``."""
    r = b.shape[1]
    blocks, cut = b.view(-1, r, r), in_blocks(weight, r)
    change = (cut.flatten(1, 2) @ blocks).view_as(cut)
    change += blocks.unsqueeze(2)
    return change.flatten(2).flatten(0, 1)[: weight.shape[0], : weight.shape[1]]


class ColumnProduct(torch.autograd.Function):
    """``x (W' - W)^T``, with `whole` ``x W'^T``, row-wise over tokens.

    x ``[tokens, in]``, weight as stored and frozen or a reader of codes, B ``[blocks r, r]``; x and B of one dtype. Saved for
    backward: x, B, a reference to the weight.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | SliceReader, b: Tensor, transposed: bool, whole: bool) -> Tensor:
        ctx.reader = weight if isinstance(weight, SliceReader) else None
        ctx.save_for_backward(x, b, None if ctx.reader else weight)
        ctx.transposed, ctx.whole = transposed, whole
        return F.linear(x, _formed(_canonical(weight, transposed, x.dtype), b, whole))

    @staticmethod
    @once_differentiable  # the weight is formed here anew, so a second derivative would miss it: refuse it
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, b, weight = ctx.saved_tensors
        w = _canonical(ctx.reader or weight, ctx.transposed, x.dtype)
        grad_x = grad @ _formed(w, b, ctx.whole) if ctx.needs_input_grad[0] else None
        grad_b = None
        if ctx.needs_input_grad[2]:
            cut, outer = in_blocks(w, b.shape[1]), in_blocks(grad.T @ x, b.shape[1])
            grad_b = cut.flatten(1, 2).mT @ outer.flatten(1, 2) + outer.sum(2)
            grad_b = grad_b.view_as(b)
        return grad_x, None, grad_b, None, None


def _canonical(weight: Tensor | SliceReader, transposed: bool, dtype: torch.dtype) -> Tensor:
    if isinstance(weight, SliceReader):
        return dequantised(weight.layer, dtype=dtype)
    return (weight.T if transposed else weight).to(dtype)


def _formed(weight: Tensor, b: Tensor, whole: bool) -> Tensor:
    change = column_change(weight, b)
    return change.add_(weight) if whole else change


class BAT(Method[BATConfig]):
    """B trained, from zero; this class is the column form."""

    config_class = BATConfig
    update_class: ClassVar[type[BATUpdate]] = BATUpdate
    variants = ({"form": "row"},)

    @classmethod
    def of(cls, config: BATConfig) -> Method[BATConfig]:
        """Of the form."""
        return BATRow(config) if config.form == "row" else cls(config)

    def specs(self, shape: Shape, rank: int) -> dict[str, Spec]:
        """B, in two dimensions."""
        side = shape[self.update_class.side]
        return {"B": Spec((side + -side % rank, rank), Kind.TRAINED)}

    def values(self, tensors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
        """B as it is."""
        return {"B": tensors["B"].clone()}

    def numbers(self, update: BATUpdate, frozen: Mapping[str, Tensor], scale: float, name: str) -> dict[str, Tensor]:
        """B as it is."""
        return {"B": update.B.clone()}

    def fitted(self, weight: Tensor, update: BATUpdate, rank: int, scale: float, name: str) -> dict[str, Tensor]:
        """B of its own rank: blocks of another width cannot be filled up."""
        return self.numbers(update.to(weight.device), {}, scale, name)

    def why_not_applied(self, layer: nn.Module) -> str | None:
        """Blocks of an embedding mix the vectors of ids that happen to be neighbours."""
        if not isinstance(layer, nn.Embedding):
            return None
        return (
            "is an embedding, of which BAT would mix the vectors of neighbouring ids; exclude it, or take another method, such"
            " as MiSS or HiRA"
        )

    def forward(self, layer: Any, x: Tensor) -> Tensor:
        """See `formed_forward`."""
        weight = SliceReader(layer) if layer.quantised else layer.weight

        def product(flat: Tensor, whole: bool) -> Tensor:
            b = layer.core(layer.scale)["B"].to(flat.dtype)
            y: Tensor = ColumnProduct.apply(flat, weight, b, layer.transposed, whole)
            return y

        return formed_forward(layer, x, product)


class BATRow(BAT):
    """The row form."""

    update_class = BATRowUpdate

    def forward(self, layer: Any, x: Tensor) -> Tensor:
        """An edit of the input, and one of the output."""
        dtype, (*tokens, inp) = compute_dtype(x), x.shape
        b = layer.core(layer.scale)["B"].to(dtype)
        r = b.shape[1]
        cut = F.pad(x, (0, -inp % r)) if inp % r else x
        cut = (
            cut.to(dtype).reshape(math.prod(tokens), len(b) // r, r).transpose(0, 1)
        )  # a view, of which the product copies nothing
        u = torch.bmm(cut, b.view(-1, r, r).mT)
        y = layer.base(x + u.transpose(0, 1).reshape(*tokens, len(b))[..., :inp].to(x.dtype))
        every = u.sum(0).to(y.dtype).view(*tokens, r)
        return y + every.repeat(*(1 for _ in tokens), -(-y.shape[-1] // r))[..., : y.shape[-1]]
