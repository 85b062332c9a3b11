"""Methods that multiply W entry by entry: ``W' = W (.) (1 + M)`` with M made of two small matrices.

On a frozen float32 weight the layer computes ``W' x``, one product each way. Elsewhere it computes ``base(x) + (W (.) M) x``:
in bfloat16, ``1 + M`` would round a small M away, and a quantised base stays a black box. Neither M nor W' is kept for the
backward pass: both are formed again there.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_pmss.layers.applied import AppliedLayer
from lightning_pmss.layers.products import without_autocast
from lightning_pmss.methods.formed import formed_forward
from lightning_pmss.methods.method import ALL, Update


@dataclass(frozen=True)
class HadamardUpdate(Update):
    """``W' = W (.) (1 + M)``.

    It changes each entry of W by a share of it, so on another base it is another change. The fingerprint therefore hashes all
    of W. For each 10^9 weights this takes one CPU core seven seconds when a training starts, and two or three when an adapter
    is loaded.
    """

    bound_to_base = True
    factors = Update.factors  # none: not those of another base class

    @abstractmethod
    def multiplier(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """``M[rows]``, new, computed in a dtype."""

    @abstractmethod
    def at(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """``M[:, ids]``, columns of M in the last dimension: ``[..., out]``, computed in a dtype."""

    @classmethod
    def reads(cls, weight: Tensor, indices: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        return (weight,)

    def delta(self, weight: Tensor, rows: slice = ALL, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or weight.dtype
        return weight[rows].to(dtype) * self.multiplier(rows, dtype)


class HadamardEdit(torch.autograd.Function):
    """``(W (.) M(a, b)) x``, with `whole` ``W' x``, row-wise over tokens. Kept for backward: x, a, b, a reference to W.

    Args of `apply`: x ``[tokens, in]``; the frozen weight as stored, or the quantised layer that makes it of its codes; a and
    b, of which M is made; ``form(a, b)``, M ``[out, in]``, new; ``pull(dM, a, b)``, the gradients of a and b; whether the layer
    stores W^T; `whole`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Any,
        a: Tensor,
        b: Tensor,
        form: Callable[[Tensor, Tensor], Tensor],
        pull: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
        transposed: bool,
        whole: bool,
    ) -> Tensor:
        ctx.form, ctx.pull, ctx.transposed, ctx.whole = form, pull, transposed, whole
        ctx.layer = None if isinstance(weight, Tensor) else weight
        ctx.save_for_backward(x, a, b, weight if ctx.layer is None else None)
        with without_autocast(x):
            return x @ _changed(form(a, b), _canonical(weight, transposed), whole).to(x.dtype).T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, a, b, stored = ctx.saved_tensors
        weight = _canonical(stored if ctx.layer is None else ctx.layer, ctx.transposed)
        grad_x = None
        with without_autocast(x):
            if ctx.needs_input_grad[0]:
                grad_x = grad @ _changed(ctx.form(a, b), weight, ctx.whole).to(grad.dtype)
            grad_a, grad_b = ctx.pull((grad.T @ x).to(a.dtype).mul_(weight), a, b)
        return grad_x, None, grad_a, grad_b, None, None, None, None


def hadamard_applied(layer: AppliedLayer, x: Tensor, update: type[HadamardUpdate]) -> Tensor:
    """``W' x`` of a convolution, with W'; of an embedding ``y (.) (1 + M[:, ids])``, with the base's own vectors y."""
    values = layer.values()
    if not layer.looks_up:
        return layer.changed(x, values, update)
    y = layer.base(x)
    factor = update(**values).at(x, next(iter(values.values())).dtype)
    return y + (y * factor).to(y.dtype)


def hadamard(
    layer: Any,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    form: Callable[[Tensor, Tensor], Tensor],
    pull: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
) -> Tensor:
    """``W' x + bias`` of a layer, see `HadamardEdit`."""
    weight = layer if layer.quantised else layer.weight
    return formed_forward(
        layer, x, lambda flat, whole: HadamardEdit.apply(flat, weight, a, b, form, pull, layer.transposed, whole)
    )


def _changed(multiplier: Tensor, weight: Tensor, whole: bool) -> Tensor:
    """``W (.) M``, or ``W + W (.) M``, in the dtype of M, which it overwrites."""
    return multiplier.mul_(weight).add_(weight) if whole else multiplier.mul_(weight)


def _canonical(weight: Any, transposed: bool) -> Tensor:
    """W ``[out, in]``, of a weight as stored or of a quantised layer."""
    if not isinstance(weight, Tensor):
        found: Tensor = weight.base_weight()
        return found
    return weight.T if transposed else weight
