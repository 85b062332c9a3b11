"""The weight edit: form ``W' = W + s C U R`` once per forward and once per backward pass, instead of thin products per token.

It pays where a micro-batch has more tokens than the layer is wide, since forming W' costs ``2 out in r`` multiply-adds however
many tokens there are. With ``M = W[rows][:, cols] [r, c]`` and U carrying the scale, bias left out of y:

    y = W' x           y[rows]  = (I_r + M U) h              h = R x
    dx = W'^T g        dx[cols] = (I_c + U M)^T (C^T g)
    dU = sum (C^T g) h^T = (I_c + U M)^-T (sum over tokens dx[cols] y[rows]^T) (I_r + M U)^-T

so neither h nor ``C^T g`` is formed per token, and only ``y[rows]`` is kept. The identities are ours; one inverse serves both
sides, since ``(I_c + U M)^-1 = I_c - U (I_r + M U)^-1 M`` (Woodbury).

An update smaller than half a step of W's own grid rounds away, which is why low-precision weights are refused. W' takes the
memory of one weight while its layer runs, beside the weight itself, which sharding strategies have gathered by then.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_pmss.layers.products import product
from lightning_pmss.methods.pmss.edits import slice_of

# Where (1 + |M U|) |(I + M U)^-1|, in the 1-norm, is above this, rounding of the products could show in U's gradient.
CONDITION_LIMIT = 1000.0


class LinearWeightEdit(torch.autograd.Function):
    """``y = x W'^T + b``, row-wise over tokens.

    x ``[tokens, in]``, weight as stored and frozen, bias ``[out]`` or None, U ``[c, r]`` with the scale, all float32 or all
    float64. Saved for backward: ``y[:, rows] [tokens, r]``, U, the indices, a reference to the weight.

    Raises:
        RuntimeError: In the backward pass: I + M U is close to singular, so that U's gradient cannot be had this way.
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
        transposed: bool,
    ) -> Tensor:
        y = product(x, edited_weight(weight, u, rows, cols, transposed), None, transposed)
        ctx.save_for_backward(y.index_select(1, rows), weight, u, rows, cols)
        ctx.transposed = transposed
        if bias is not None:
            y += bias
        return y

    @staticmethod
    @once_differentiable  # y[rows] is no input, so a second derivative would silently miss its part: refuse it
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        at_rows, weight, u, rows, cols = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = product(grad, edited_weight(weight, u, rows, cols, ctx.transposed), None, not ctx.transposed)
            through = grad_x.index_select(1, cols)
        else:  # the first layers of a model: a thin product does
            through = grad @ slice_of(weight, cols, 1, ctx.transposed, grad.dtype)
        grad_u = None
        if ctx.needs_input_grad[3]:
            m = slice_of(slice_of(weight, rows, 0, ctx.transposed, u.dtype), cols, 1, False, u.dtype)
            grad_u = _solved(through.T @ at_rows, m, u, both=grad_x is not None)
        grad_bias = grad.sum(0) if ctx.needs_input_grad[2] else None
        return grad_x, None, grad_bias, grad_u, None, None, None


def break_even_tokens(shape: tuple[int, int], rank: int) -> int:
    """Tokens per micro-batch from which the weight edit takes fewer multiply-adds than the thin one, forward and backward.

    Counted: W' twice ``2 out r (in + r)``, small matrices about ``12 r^3`` (in float64, which counts twice), and one product
    of ``r^2`` per token; against ``2 r min(in, out) + 3 r^2`` per token. Measured on a CPU: within a tenth of it at rank 256
    (docs/performance.md).

    Args:
        shape: ``(out, in)`` of the layer.
        rank: Rows and columns.
    """
    out, inp = shape
    once = 2 * out * rank * (inp + rank) + 12 * rank**3
    return -(-once // (2 * rank * (min(shape) + rank)))


def edited_weight(weight: Tensor, u: Tensor, rows: Tensor, cols: Tensor, transposed: bool) -> Tensor:
    """W' in the layout of ``weight``."""
    r = slice_of(weight, rows, 0, transposed, weight.dtype)
    c = slice_of(weight, cols, 1, transposed, weight.dtype)
    return torch.addmm(weight, r.T @ u.T, c.T) if transposed else torch.addmm(weight, c @ u, r)


def _solved(outer: Tensor, m: Tensor, u: Tensor, both: bool) -> Tensor:
    """dU ``[c, r]`` from the sum of outer products; small matrices, in float64. both: whether dx or C^T g is in the sum."""
    m, wide = m.double(), u.double()
    change = m @ wide
    inverse, failed = torch.linalg.inv_ex(change + torch.eye(m.shape[0], dtype=m.dtype, device=m.device))
    # Not the norm of I + M U: where U cancels the identity that one is nothing but rounding.
    condition = (1 + torch.linalg.matrix_norm(change, 1)) * torch.linalg.matrix_norm(inverse, 1)
    _require(
        (failed == 0) & (condition <= CONDITION_LIMIT),
        f"edit='weight': I + M U of a layer of rank {m.shape[1]}x{m.shape[0]} is close to singular (condition above"
        f" {CONDITION_LIMIT:g}): U has grown too large for U's gradient to be had from W'. Train with edit='auto', or with a"
        " lower learning rate.",
    )
    grad_u = outer.double() @ inverse.T
    if both:
        grad_u = grad_u - m.T @ (inverse.T @ (wide.T @ grad_u))
    return grad_u.to(u.dtype)


def _require(holds: Tensor, message: str) -> None:
    # On a GPU the assertion that needs no synchronisation would end the process without the message.
    if holds.is_cuda and not torch.compiler.is_compiling():
        if not holds:
            raise RuntimeError(message)
    else:
        torch._assert_async(holds, message)
