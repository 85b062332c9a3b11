"""The edits as autograd functions: what a converted layer computes beside its base product, and what it keeps.

Plain autograd would keep the slices of W and intermediate activations; these keep h ``[tokens, r]``, U and indices, and the
slice only if asked to. Equal to the plain form (tested, also by gradcheck in float64).

Two pairs: `InputEdit` and `OutputEdit` stand before and behind a base product that they know nothing of (quantised layers,
autocast, a trained weight). `LinearInputEdit` and `LinearOutputEdit` hold the product of a frozen ``nn.Linear`` or ``Conv1D``
themselves, and so may write into tensors that autograd would have to copy: y before anyone has seen it, and dx.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_pmss.layers.products import product
from lightning_pmss.layers.quantised import SliceReader


def slice_of(weight: Tensor | SliceReader, index: Tensor, dim: int, transposed: bool, dtype: torch.dtype) -> Tensor:
    """Rows (dim 0) or columns (dim 1) of the canonical W, in the compute dtype."""
    if isinstance(weight, SliceReader):
        return weight.slice(index, dim, dtype)
    if transposed:
        return weight.index_select(1 - dim, index).T.to(dtype)
    return weight.index_select(dim, index).to(dtype)


def _masked(h: Tensor, mask: Tensor | None) -> Tensor:
    return h if mask is None else h * mask


class LinearOutputEdit(torch.autograd.Function):
    """``y = y0 + (h U^T) C^T + b`` with ``y0 = x W^T`` and ``h = y0[:, rows]``, row-wise over tokens; U carries the scale.

    x ``[tokens, in]``, weight as stored and frozen, bias ``[out]`` or None, U ``[c, r]``, all of one dtype; mask
    ``[tokens, r]`` or None multiplies h. Saved for backward: h, U, indices, mask, a reference to the weight, and C (``keep``).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        u: Tensor,
        rows: Tensor,
        cols: Tensor,
        mask: Tensor | None,
        keep: bool,
        transposed: bool,
    ) -> Tensor:
        c = slice_of(weight, cols, 1, transposed, x.dtype)
        y = product(x, weight, None, transposed)
        h = _masked(y.index_select(1, rows), mask)  # before the bias: in bfloat16 a large one would swamp h
        y.addmm_(h @ u.T, c.T)
        if bias is not None:
            y += bias
        ctx.save_for_backward(h, u, rows, cols, mask, weight, c if keep else None)
        ctx.transposed = transposed
        return y

    @staticmethod
    @once_differentiable  # h is no input, so a second derivative would silently miss its part: refuse it
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        h, u, rows, cols, mask, weight, c = ctx.saved_tensors
        c = slice_of(weight, cols, 1, ctx.transposed, h.dtype) if c is None else c
        through_c = grad @ c
        grad_u = through_c.T @ h
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_y0 = grad.index_add(1, rows, _masked(through_c @ u, mask))
            grad_x = product(grad_y0, weight, None, not ctx.transposed)
        grad_bias = grad.sum(0) if ctx.needs_input_grad[2] else None
        return grad_x, None, grad_bias, grad_u, None, None, None, None, None


class LinearInputEdit(torch.autograd.Function):
    """``y = x' W^T + b`` with ``x' = x + scatter_cols(h U^T)`` and ``h = x R^T``, row-wise over tokens; U carries the scale.

    Arguments and what is saved as for `LinearOutputEdit`, with R ``[r, in]`` in C's place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        u: Tensor,
        rows: Tensor,
        cols: Tensor,
        mask: Tensor | None,
        keep: bool,
        transposed: bool,
    ) -> Tensor:
        r = slice_of(weight, rows, 0, transposed, x.dtype)
        h = _masked(x @ r.T, mask)
        ctx.save_for_backward(h, u, rows, cols, mask, weight, r if keep else None)
        ctx.transposed = transposed
        return product(x.index_add(1, cols, h @ u.T), weight, bias, transposed)

    @staticmethod
    @once_differentiable  # h is no input, so a second derivative would silently miss its part: refuse it
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        h, u, rows, cols, mask, weight, r = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            r = slice_of(weight, rows, 0, ctx.transposed, h.dtype) if r is None else r
            grad_x = product(grad, weight, None, not ctx.transposed)
            at_cols = grad_x.index_select(1, cols)
            grad_x.addmm_(_masked(at_cols @ u, mask), r)
        else:  # the first layers of a model: no product with the whole of W is needed
            at_cols = grad @ slice_of(weight, cols, 1, ctx.transposed, h.dtype)
        grad_u = at_cols.T @ h
        grad_bias = grad.sum(0) if ctx.needs_input_grad[2] else None
        return grad_x, None, grad_bias, grad_u, None, None, None, None, None


class OutputEdit(torch.autograd.Function):
    """``y = y0 + (h U^T) C^T`` with ``h = y0[:, rows]``, row-wise over tokens; U carries the scale.

    y0 ``[tokens, out]``, weight as stored, U ``[c, r]`` in y0's dtype; mask ``[tokens, r]`` or None multiplies h. Saved for
    backward: h, U, the indices, and C (``keep``) or nothing but a reference to the weight, from which C is gathered again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y0: Tensor,
        weight: Tensor | SliceReader,
        u: Tensor,
        rows: Tensor,
        cols: Tensor,
        mask: Tensor | None,
        keep: bool,
        transposed: bool,
    ) -> Tensor:
        c = slice_of(weight, cols, 1, transposed, y0.dtype)
        h = _masked(y0.index_select(1, rows), mask)
        ctx.reader = weight if isinstance(weight, SliceReader) else None
        ctx.save_for_backward(h, u, rows, cols, mask, c if keep else None if ctx.reader else weight)
        ctx.keep, ctx.transposed = keep, transposed
        return torch.addmm(y0, h @ u.T, c.T)

    @staticmethod
    @once_differentiable  # h is no input, so a second derivative would silently miss its part: refuse it
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        h, u, rows, cols, mask, source = ctx.saved_tensors
        c = source if ctx.keep else slice_of(ctx.reader or source, cols, 1, ctx.transposed, h.dtype)
        through_c = grad @ c
        grad_u = through_c.T @ h
        grad_y0 = None
        if ctx.needs_input_grad[0]:
            grad_y0 = grad.index_add(1, rows, _masked(through_c @ u, mask))
        return grad_y0, None, grad_u, None, None, None, None, None


class InputEdit(torch.autograd.Function):
    """``x' = x + scatter_cols(h U^T)`` with ``h = x R^T``, row-wise over tokens; U carries the scale.

    x ``[tokens, in]``, U ``[c, r]`` in the compute dtype. The sum is taken in x's own dtype: the base may
    still cast it, as under autocast, but it is rounded only once. Saved for backward: h, U, the indices, R or the weight.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | SliceReader,
        u: Tensor,
        rows: Tensor,
        cols: Tensor,
        mask: Tensor | None,
        keep: bool,
        transposed: bool,
    ) -> Tensor:
        r = slice_of(weight, rows, 0, transposed, u.dtype)
        h = _masked(x.to(u.dtype) @ r.T, mask)
        ctx.reader = weight if isinstance(weight, SliceReader) else None
        ctx.save_for_backward(h, u, rows, cols, mask, r if keep else None if ctx.reader else weight)
        ctx.keep, ctx.transposed = keep, transposed
        return x.index_add(1, cols, (h @ u.T).to(x.dtype))

    @staticmethod
    @once_differentiable  # h is no input, so a second derivative would silently miss its part: refuse it
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        h, u, rows, cols, mask, source = ctx.saved_tensors
        at_cols = grad.index_select(1, cols).to(h.dtype)
        grad_u = at_cols.T @ h
        grad_x = None
        if ctx.needs_input_grad[0]:
            r = source if ctx.keep else slice_of(ctx.reader or source, rows, 0, ctx.transposed, h.dtype)
            grad_h = _masked(at_cols @ u, mask)
            grad_x = torch.addmm(grad, grad_h, r) if grad.dtype == r.dtype else grad + (grad_h @ r).to(grad.dtype)
        return grad_x, None, grad_u, None, None, None, None, None
