"""The two edits as autograd functions: what a converted layer computes beside its base product, and what it keeps.

Plain autograd would keep the slices of W and intermediate activations; these keep h ``[tokens, r]``, U and indices, and the
slice only if asked to. Equal to the plain form (tested, also by gradcheck in float64).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which a linear layer would compute: autocast's where it applies (never to float64), else the input's."""
    device = tensor.device.type
    # The meta device, on which shapes and operations are counted, has no autocast and raises when asked.
    if tensor.dtype != torch.float64 and device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return tensor.dtype


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """A context in which products of such tensors are computed in their own dtype."""
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


def _slice(weight: Tensor, index: Tensor, dim: int, transposed: bool, dtype: torch.dtype) -> Tensor:
    """Rows (dim 0) or columns (dim 1) of the canonical W, in the compute dtype."""
    if transposed:
        return weight.index_select(1 - dim, index).T.to(dtype)
    return weight.index_select(dim, index).to(dtype)


class OutputEdit(torch.autograd.Function):
    """``y = y0 + (h U^T) C^T`` with ``h = y0[:, rows]``, row-wise over tokens; U carries the scale.

    y0 ``[tokens, out]``, weight as stored, U ``[c, r]`` in y0's dtype; mask ``[tokens, r]`` or None multiplies h. Saved for
    backward: h, U, the indices, and C (``keep``) or nothing but a reference to the weight, from which C is gathered again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y0: Tensor,
        weight: Tensor,
        u: Tensor,
        rows: Tensor,
        cols: Tensor,
        mask: Tensor | None,
        keep: bool,
        transposed: bool,
    ) -> Tensor:
        c = _slice(weight, cols, 1, transposed, y0.dtype)
        h = y0.index_select(1, rows)
        if mask is not None:
            h = h * mask
        ctx.save_for_backward(h, u, rows, cols, mask, c if keep else weight)
        ctx.keep, ctx.transposed = keep, transposed
        return torch.addmm(y0, h @ u.T, c.T)

    @staticmethod
    @once_differentiable  # h is no input, so a second derivative would silently miss its part: refuse it
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        h, u, rows, cols, mask, source = ctx.saved_tensors
        c = source if ctx.keep else _slice(source, cols, 1, ctx.transposed, h.dtype)
        through_c = grad @ c
        grad_u = through_c.T @ h
        grad_y0 = None
        if ctx.needs_input_grad[0]:
            grad_h = through_c @ u
            grad_y0 = grad.index_add(1, rows, grad_h if mask is None else grad_h * mask)
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
        weight: Tensor,
        u: Tensor,
        rows: Tensor,
        cols: Tensor,
        mask: Tensor | None,
        keep: bool,
        transposed: bool,
    ) -> Tensor:
        r = _slice(weight, rows, 0, transposed, u.dtype)
        h = x.to(u.dtype) @ r.T
        if mask is not None:
            h = h * mask
        ctx.save_for_backward(h, u, rows, cols, mask, r if keep else weight)
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
            r = source if ctx.keep else _slice(source, rows, 0, ctx.transposed, h.dtype)
            grad_h = at_cols @ u
            grad_x = grad + ((grad_h if mask is None else grad_h * mask) @ r).to(grad.dtype)
        return grad_x, None, grad_u, None, None, None, None, None
