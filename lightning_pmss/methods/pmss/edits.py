"""The edits as autograd functions: what a converted layer computes beside its base product, and what it keeps.

Plain autograd would keep the slices of W and intermediate activations; these keep h ``[tokens, r]``, U and indices, and the
slice only if asked to. Equal to the plain form (tested, also by gradcheck in float64).

`InputEdit` changes x before the base product, `OutputEdit` changes y behind it. Either stands beside a base product that it
knows nothing of (quantised layers, autocast, a trained weight), or computes that of a frozen ``nn.Linear`` or ``Conv1D`` itself
(``Options.base``) and so may write into tensors that autograd would have to copy: y before anyone has seen it, and dx.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_pmss.layers.products import product
from lightning_pmss.layers.quantised import SliceReader


class Options(NamedTuple):
    """How an edit computes.

    Attributes:
        base: Compute the base product too. Weight, x and U must then have one dtype, and the weight be frozen.
        keep: Keep the slice of W for the backward pass; otherwise it is gathered again.
        transposed: The weight is W^T.
    """

    base: bool
    keep: bool
    transposed: bool


def slice_of(weight: Tensor | SliceReader, index: Tensor, dim: int, transposed: bool, dtype: torch.dtype) -> Tensor:
    """Rows (dim 0) or columns (dim 1) of the canonical W, in the compute dtype."""
    if isinstance(weight, SliceReader):
        return weight.slice(index, dim, dtype)
    if transposed:
        return weight.index_select(1 - dim, index).T.to(dtype)
    return weight.index_select(dim, index).to(dtype)


def _masked(h: Tensor, mask: Tensor | None) -> Tensor:
    return h if mask is None else h * mask


class OutputEdit(torch.autograd.Function):
    """``y = y0 + (h U^T) C^T (+ b)`` with ``h = y0[:, rows]``, row-wise over tokens; U carries the scale.

    x is y0 ``[tokens, out]``, or with ``options.base`` the layer's input ``[tokens, in]``, from which ``y0 = x W^T``. weight as
    stored; bias ``[out]`` or None, with ``options.base`` alone; U ``[c, r]`` in y0's dtype; mask ``[tokens, r]`` or None
    multiplies h.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | SliceReader,
        bias: Tensor | None,
        u: Tensor,
        rows: Tensor,
        cols: Tensor,
        mask: Tensor | None,
        options: Options,
    ) -> Tensor:
        c = slice_of(weight, cols, 1, options.transposed, x.dtype)
        y = product(x, weight, None, options.transposed) if options.base else x  # type: ignore[arg-type]
        h = _masked(y.index_select(1, rows), mask)  # before the bias: in bfloat16 a large one would swamp h
        y = y.addmm_(h @ u.T, c.T) if options.base else torch.addmm(y, h @ u.T, c.T)
        if bias is not None:
            y += bias
        _save(ctx, weight, c, options, h, u, rows, cols, mask)
        return y

    @staticmethod
    @once_differentiable  # h is no input, so a second derivative would silently miss its part: refuse it
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        h, u, rows, cols, mask, weight, kept = ctx.saved_tensors
        through_c = grad @ (_gathered(ctx, weight, cols, 1, h.dtype) if kept is None else kept)
        grad_u = through_c.T @ h
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad.index_add(1, rows, _masked(through_c @ u, mask))
            if ctx.options.base:
                grad_x = product(grad_x, weight, None, not ctx.options.transposed)
        grad_bias = grad.sum(0) if ctx.needs_input_grad[2] else None
        return grad_x, None, grad_bias, grad_u, None, None, None, None


class InputEdit(torch.autograd.Function):
    """``x' = x + scatter_cols(h U^T)`` with ``h = x R^T``, row-wise over tokens; with ``options.base`` ``y = x' W^T + b``.

    Arguments as of `OutputEdit`. x' is summed in x's own dtype: the base may still cast it, as under autocast, but it is
    rounded only once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | SliceReader,
        bias: Tensor | None,
        u: Tensor,
        rows: Tensor,
        cols: Tensor,
        mask: Tensor | None,
        options: Options,
    ) -> Tensor:
        r = slice_of(weight, rows, 0, options.transposed, u.dtype)
        h = _masked(x.to(u.dtype) @ r.T, mask)
        _save(ctx, weight, r, options, h, u, rows, cols, mask)
        edited = x.index_add(1, cols, (h @ u.T).to(x.dtype))
        return product(edited, weight, bias, options.transposed) if options.base else edited  # type: ignore[arg-type]

    @staticmethod
    @once_differentiable  # h is no input, so a second derivative would silently miss its part: refuse it
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        h, u, rows, cols, mask, weight, kept = ctx.saved_tensors
        base, transposed = ctx.options.base, ctx.options.transposed
        if (
            base and not ctx.needs_input_grad[0]
        ):  # the first layers of a model: no product with the whole of W is needed
            at_cols = grad @ slice_of(weight, cols, 1, transposed, h.dtype)
        else:
            grad_x = product(grad, weight, None, not transposed) if base else grad
            at_cols = grad_x.index_select(1, cols).to(h.dtype)
        if ctx.needs_input_grad[0]:
            r = _gathered(ctx, weight, rows, 0, h.dtype) if kept is None else kept
            grad_h = _masked(at_cols @ u, mask)
            if base:
                grad_x.addmm_(grad_h, r)
            elif grad.dtype == r.dtype:
                grad_x = torch.addmm(grad, grad_h, r)
            else:
                grad_x = grad + (grad_h @ r).to(grad.dtype)
        grad_bias = grad.sum(0) if ctx.needs_input_grad[2] else None
        return grad_x if ctx.needs_input_grad[0] else None, None, grad_bias, at_cols.T @ h, None, None, None, None


def _save(ctx: Any, weight: Tensor | SliceReader, part: Tensor, options: Options, *tensors: Tensor | None) -> None:
    """Keep tensors, a reference to the weight, and the slice if asked to."""
    ctx.options, ctx.reader = options, weight if isinstance(weight, SliceReader) else None
    ctx.save_for_backward(*tensors, None if ctx.reader else weight, part if options.keep else None)


def _gathered(ctx: Any, weight: Any, index: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """The slice that was not kept."""
    return slice_of(ctx.reader or weight, index, dim, ctx.options.transposed, dtype)
