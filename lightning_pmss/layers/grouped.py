"""Products of stacked matrices with tokens that are sorted by expert: ``y_s = M[e(s)] x_s``.

On CUDA in bfloat16 they are torch's grouped product. In other dtypes, or where a side is no multiple of 16 bytes, which that
kernel asks for, each expert that has tokens gets a product of its own. Frozen matrices keep nothing of x for the backward pass.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lightning_pmss.layers.products import compute_dtype

_ALIGNED = 16  # bytes


class Groups:
    """The pairs of token and expert of one pass, sorted by expert.

    Args:
        chosen: Experts of each token, int64 ``[tokens, k]``.
        experts: Number of experts.

    Attributes:
        ids: Expert of each pair, ascending, ``[tokens k]``.
        order: Position of each pair before it was sorted.
        offsets: End of each expert's pairs, int32 ``[experts]``.
    """

    def __init__(self, chosen: Tensor, experts: int) -> None:
        self.experts = experts
        self.ids, self.order = torch.sort(chosen.reshape(-1), stable=True)
        every = torch.arange(experts, device=self.ids.device, dtype=self.ids.dtype)
        self.offsets = torch.searchsorted(self.ids, every, right=True).to(torch.int32)

    @cached_property
    def parts(self) -> list[tuple[int, slice]]:
        """(expert, its pairs) of the experts that have tokens; waits for the device once. An estimate has no tokens."""
        if isinstance(self.offsets, FakeTensor):
            return []
        ends = self.offsets.tolist()
        starts = [0, *ends[:-1]]
        return [(i, slice(start, end)) for i, (start, end) in enumerate(zip(starts, ends, strict=True)) if start < end]

    def seen(self) -> Tensor:
        """Whether an expert has tokens, bool ``[experts]``."""
        return torch.diff(self.offsets, prepend=self.offsets.new_zeros(1)) > 0

    def linear(
        self, x: Tensor, matrices: Tensor, index: Tensor | None = None, dim: int = 0, transposed: bool = False
    ) -> Tensor:
        """``M[e] x`` in the dtype in which a linear layer computes.

        Args:
            x: ``[pairs, in]``, sorted.
            matrices: ``[experts, out, in]``.
            index: int64 ``[experts, k]``, to use only these rows (dim 0) or columns (dim 1) of each; they are gathered anew in
                the backward pass.
            dim: See `index`.
            transposed: Whether the matrices are stored ``[experts, in, out]``.
        """
        y: Tensor = GroupedProduct.apply(x.to(compute_dtype(x)), matrices, index, dim, transposed, self)
        return y

    def take(self, y: Tensor, index: Tensor) -> Tensor:
        """The entries ``index[e] [k]`` of each token's y: ``[pairs, k]``."""
        taken: Tensor = Take.apply(y, index, self)
        return taken

    def put(self, x: Tensor, h: Tensor, index: Tensor) -> Tensor:
        """x with ``h [pairs, k]`` added to its entries ``index[e] [k]``."""
        put: Tensor = Put.apply(x, h, index, self)
        return put


def canonical(matrices: Tensor, transposed: bool) -> Tensor:
    """``[experts, out, in]``, of matrices as they are stored."""
    return matrices.mT if transposed else matrices


def sliced(matrices: Tensor, index: Tensor | None, dim: int) -> Tensor:
    """Rows (dim 0) or columns (dim 1) ``index [experts, k]`` of stacked matrices; all of them without an index."""
    if index is None:
        return matrices
    if dim == 0:
        return matrices.gather(1, index.unsqueeze(2).expand(-1, -1, matrices.shape[2]))
    return matrices.gather(2, index.unsqueeze(1).expand(-1, matrices.shape[1], -1))


class GroupedProduct(torch.autograd.Function):
    """See `Groups.linear`. Saved for backward: a reference to the matrices; x where they are trained.

    Of frozen ones it is the parameter itself, never a view: ZeRO-3 replaces its memory between the passes.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, matrices: Tensor, index: Tensor | None, dim: int, transposed: bool, groups: Groups
    ) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, matrices, index)
        ctx.dim, ctx.transposed, ctx.groups = dim, transposed, groups
        return products(x, sliced(canonical(matrices, transposed), index, dim).to(x.dtype).mT, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, matrices, index = ctx.saved_tensors
        grad_x = grad_m = None
        if ctx.needs_input_grad[0]:
            read = sliced(canonical(matrices, ctx.transposed), index, ctx.dim)
            grad_x = products(grad, read.to(grad.dtype), ctx.groups)
        if ctx.needs_input_grad[1]:
            assert index is None, "only frozen matrices are read in slices"
            assert not ctx.transposed, "only frozen matrices are stored transposed"
            grad_m = outer_sums(grad, x, ctx.groups).to(matrices.dtype)
        return grad_x, grad_m, None, None, None, None


class Take(torch.autograd.Function):
    """See `Groups.take`; the index of each token is made anew in the backward pass."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, index: Tensor, groups: Groups) -> Tensor:
        ctx.save_for_backward(index)
        ctx.groups, ctx.width = groups, y.shape[1]
        return y.gather(1, index[groups.ids])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        (index,) = ctx.saved_tensors
        return grad.new_zeros(len(grad), ctx.width).scatter_(1, index[ctx.groups.ids], grad), None, None


class Put(torch.autograd.Function):
    """See `Groups.put`; the index of each token is made anew in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, h: Tensor, index: Tensor, groups: Groups) -> Tensor:
        ctx.save_for_backward(index)
        ctx.groups, ctx.dtype = groups, h.dtype
        return x.scatter_add(1, index[groups.ids], h.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        (index,) = ctx.saved_tensors
        return grad, grad.gather(1, index[ctx.groups.ids]).to(ctx.dtype), None, None


def products(x: Tensor, matrices: Tensor, groups: Groups) -> Tensor:
    """``x_s M[e(s)]``: x ``[pairs, in]``, matrices ``[experts, in, out]`` of the same dtype."""
    x = x.contiguous()
    if _has_kernel(x, *matrices.shape[1:]):
        return F.grouped_mm(x, matrices, offs=groups.offsets)
    y = x.new_empty(len(x), matrices.shape[2])
    for expert, part in groups.parts:
        torch.mm(x[part], matrices[expert], out=y[part])
    return y


def outer_sums(left: Tensor, right: Tensor, groups: Groups) -> Tensor:
    """``sum_s left_s right_s^T`` of each expert: ``[experts, m, n]``; zero where no token came."""
    left, right = left.contiguous(), right.contiguous()
    if _has_kernel(left, left.shape[1], right.shape[1]) and len(left):
        found = F.grouped_mm(left.T, right, offs=groups.offsets)
        return found.where(groups.seen()[:, None, None], 0)
    sums = left.new_zeros(groups.experts, left.shape[1], right.shape[1])
    for expert, part in groups.parts:
        torch.mm(left[part].T, right[part], out=sums[expert])
    return sums


def _has_kernel(x: Tensor, *sides: int) -> bool:
    """Whether torch's grouped product serves tensors like x with these sides."""
    if x.device.type != "cuda" or x.dtype != torch.bfloat16 or torch.cuda.get_device_capability(x.device) < (8, 0):
        return False
    return all(side * x.element_size() % _ALIGNED == 0 for side in sides)
