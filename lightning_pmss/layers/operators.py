"""Layers that apply W to something else than vectors: convolutions to patches, embeddings to ids.

A convolution computes ``W p`` of each patch p of its input, flattened; an embedding ``W e`` of the vector e that is one at an
id and zero elsewhere. Neither makes p or e. A method needs no more than the product of some matrix ``[k, in]`` with the input,
in the way of the layer, and the product of a matrix with the features of that result.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lightning_pmss.layers.products import compute_dtype, without_autocast

_CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_MIXERS = (F.conv1d, F.conv2d, F.conv3d)
CONVERTED = "nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d and nn.Embedding layers"
"""What is converted, for messages."""


class Operator(ABC):
    """How a layer applies matrices to its input; stateless."""

    looks_up: ClassVar[bool] = False
    """Whether the input are ids."""

    @abstractmethod
    def dim(self, layer: Any) -> int:
        """The dimension of the features of an output, counted from the end."""

    @abstractmethod
    def base(self, layer: Any, x: Tensor) -> Tensor:
        """``W x``, without a bias. What is kept of W is the parameter itself, which engines may take back meanwhile."""

    @abstractmethod
    def linear(self, layer: Any, x: Tensor, matrix: Tensor) -> Tensor:
        """``M x``: a matrix ``[k, in]`` applied as the layer applies W, so that the output has k features; no bias."""

    @abstractmethod
    def mixed(self, layer: Any, h: Tensor, matrix: Tensor) -> Tensor:
        """``M h`` of the features of an output: a matrix ``[out, k]``, in the dtype of h."""

    @abstractmethod
    def finished(self, layer: Any, x: Tensor, y: Tensor) -> Tensor:
        """What the layer does with its product y."""

    @abstractmethod
    def shape(self, layer: Any) -> tuple[int, int]:
        """``(out, in)`` of W, from the layer's attributes."""

    @abstractmethod
    def inputs(self, layer: Any) -> int:
        """Numbers of the input for each place of the output, as far as layers keep them for the backward pass."""

    @abstractmethod
    def why_not(self, layer: Any) -> str | None:
        """Why this layer cannot be converted, behind its name; None if it can."""


class Convolution(Operator):
    """``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``, whatever their stride, padding, padding mode and dilation."""

    def dim(self, layer: Any) -> int:
        return -1 - len(layer.kernel_size)

    def base(self, layer: Any, x: Tensor) -> Tensor:
        return self._convolved(layer, x, layer.weight)

    def linear(self, layer: Any, x: Tensor, matrix: Tensor) -> Tensor:
        return self._convolved(layer, x, matrix.view(len(matrix), layer.in_channels, *layer.kernel_size))

    def _convolved(self, layer: Any, x: Tensor, kernel: Tensor) -> Tensor:
        dtype = compute_dtype(x)
        kernel = kernel.to(dtype)
        if kernel.requires_grad or not x.requires_grad:
            trained: Tensor = layer._conv_forward(x, kernel, None)
            return trained
        padding = layer.padding
        if isinstance(padding, str) or layer.padding_mode != "zeros":
            mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
            x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode), (0,) * len(layer.kernel_size)
        one = x.dim() == len(layer.kernel_size) + 1  # an image alone
        x = x.unsqueeze(0) if one else x
        y: Tensor = FrozenConvolution.apply(x.to(dtype), kernel, layer.stride, padding, layer.dilation)
        return y.squeeze(0) if one else y

    def mixed(self, layer: Any, h: Tensor, matrix: Tensor) -> Tensor:
        sides = len(layer.kernel_size)
        kernel = matrix.to(h.dtype)[(..., *[None] * sides)]
        y: Tensor = _MIXERS[sides - 1](h, kernel)
        return y

    def finished(self, layer: Any, x: Tensor, y: Tensor) -> Tensor:
        if layer.bias is None:
            return y
        return y + layer.bias.to(y.dtype)[(..., *[None] * len(layer.kernel_size))]

    def shape(self, layer: Any) -> tuple[int, int]:
        inputs = layer.in_channels // layer.groups
        for size in layer.kernel_size:
            inputs *= size
        return int(layer.out_channels), int(inputs)

    def inputs(self, layer: Any) -> int:
        return int(layer.in_channels)

    def why_not(self, layer: Any) -> str | None:
        if layer.groups > 1:
            return f"has groups={layer.groups}, so that no one matrix is applied to its patches"
        known = next(kind for kind in _CONVOLUTIONS if isinstance(layer, kind))
        return None if _is_own(layer, known, "forward", "_conv_forward") else _hidden(layer)


class FrozenConvolution(torch.autograd.Function):
    """A convolution whose kernel is frozen. Autograd's own keeps x, though the gradient of x needs the kernel alone.

    x ``[batch, in, ...]`` and the kernel ``[k, in, ...]``, both of one dtype. Saved for backward: the kernel, by reference.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        kernel: Tensor,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
    ) -> Tensor:
        ctx.save_for_backward(kernel)
        ctx.shape, ctx.how = x.shape, (stride, padding, dilation, False, (0,) * len(stride), 1)
        with without_autocast(x):
            return torch.convolution(x, kernel, None, *ctx.how)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (kernel,) = grads, ctx.saved_tensors
        like = grad.new_empty(1).expand(ctx.shape)  # of which the shape is read
        with without_autocast(grad):
            found = torch.ops.aten.convolution_backward(grad, like, kernel, None, *ctx.how, (True, False, False))
        return found[0], None, None, None, None


class Lookup(Operator):
    """``nn.Embedding``. ``sparse`` concerns the gradient of a frozen weight; those of the adapter are dense."""

    looks_up = True

    def dim(self, layer: Any) -> int:
        return -1

    def base(self, layer: Any, x: Tensor) -> Tensor:
        return F.embedding(x, layer.weight)

    def linear(self, layer: Any, x: Tensor, matrix: Tensor) -> Tensor:
        return F.embedding(x, matrix.T)

    def mixed(self, layer: Any, h: Tensor, matrix: Tensor) -> Tensor:
        return F.linear(h, matrix.to(h.dtype))

    def finished(self, layer: Any, x: Tensor, y: Tensor) -> Tensor:
        """torch takes no gradient from the vectors at ``padding_idx``."""
        if layer.padding_idx is None or not y.requires_grad:
            return y
        return torch.where((x == layer.padding_idx)[..., None], y.detach(), y)

    def shape(self, layer: Any) -> tuple[int, int]:
        return int(layer.embedding_dim), int(layer.num_embeddings)

    def inputs(self, layer: Any) -> int:
        return 0

    def why_not(self, layer: Any) -> str | None:
        if layer.max_norm is not None:
            return f"has max_norm={layer.max_norm:g}, which changes the frozen weight in each forward pass"
        if layer.scale_grad_by_freq:
            return "has scale_grad_by_freq=True, which is defined for the gradient of its weight alone"
        return None if _is_own(layer, nn.Embedding, "forward") else _hidden(layer)


_CONVOLUTION, _LOOKUP = Convolution(), Lookup()


def operator_of(layer: nn.Module) -> Operator | None:
    """How a layer applies its weight; None where it is no convolution and no embedding."""
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin):
        return None
    if isinstance(layer, nn.Embedding):
        return _LOOKUP
    return _CONVOLUTION if isinstance(layer, _CONVOLUTIONS) else None


def why_not_applied(layer: nn.Module) -> str | None:
    """Why a convolution or an embedding cannot be converted, behind its name; None if it can, or is something else."""
    operator = operator_of(layer)
    return None if operator is None else operator.why_not(layer)


def why_no_dropout(layer: nn.Module, probability: float) -> str | None:
    """Why a layer cannot have dropout on its input, behind its name; None if it can."""
    if probability > 0 and isinstance(operator_of(layer), Lookup):
        return "is an embedding, whose input are ids, of which dropout would make others; type dropout=0, or exclude it"
    return None


def refuse_applied(layers: Mapping[str, nn.Module], lacking: str, instead: str) -> None:
    """Refuse what is not there for convolutions and embeddings.

    Args:
        layers: Layers by name.
        lacking: What is not there, before their name: ``"FlatLoRA gives no noise to"``.
        instead: What to do instead of leaving them out.

    Raises:
        ValueError: One of the layers is a convolution or an embedding.
    """
    if found := next((name for name, layer in layers.items() if operator_of(layer) is not None), None):
        raise ValueError(
            f"{lacking} convolutions and embeddings, such as `{found}`. Convert without them: take them out of target_modules;"
            f" or {instead}."
        )


def _is_own(layer: nn.Module, known: type[nn.Module], *methods: str) -> bool:
    base = getattr(layer, "base_class", type(layer))
    return all(getattr(base, name) is getattr(known, name) for name in methods)


def _hidden(layer: nn.Module) -> str:
    return f"has a forward of its own, in which {type(layer).__name__} may do more than apply its weight"
