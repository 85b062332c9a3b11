"""What a method sees of a converted convolution or embedding in one pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_pmss.layers.adapter import Tensors
from lightning_pmss.layers.operators import Operator
from lightning_pmss.layers.products import compute_dtype, without_autocast

if TYPE_CHECKING:
    from lightning_pmss.layers.adapted import AdaptedLinear
    from lightning_pmss.methods.method import Update


@dataclass(frozen=True)
class AppliedLayer:
    """A layer that applies W to patches or ids. Outputs have their features in the dimension `dim`, and no bias.

    Attributes:
        layer: The converted layer.
        operator: How it applies matrices.
    """

    layer: AdaptedLinear
    operator: Operator

    @property
    def training(self) -> bool:
        """Whether the layer is in training mode."""
        return self.layer.training

    @property
    def looks_up(self) -> bool:
        """Whether the input are ids."""
        return self.operator.looks_up

    @property
    def dim(self) -> int:
        """The dimension of the features of an output, counted from the end."""
        return self.operator.dim(self.layer)

    @property
    def weight(self) -> Tensor:
        """W ``[out, in]``, frozen."""
        return self.layer.layout.canonical(self.layer.weight.detach())

    @property
    def indices(self) -> Mapping[str, Tensor]:
        """Index tensors on the device of the weight."""
        names = self.layer.index_names
        return dict(zip(names, self.layer.indices_on(self.layer.weight.device), strict=True))

    def values(self) -> Tensors:
        """The floating-point tensors of the update."""
        found: Tensors = self.layer.core(self.layer.scale)
        return found

    def base(self, x: Tensor) -> Tensor:
        """``W x``."""
        return self.operator.base(self.layer, x)

    def linear(self, x: Tensor, matrix: Tensor) -> Tensor:
        """``M x`` with a matrix ``[k, in]``: k features."""
        return self.operator.linear(self.layer, x, matrix)

    def mixed(self, h: Tensor, matrix: Tensor) -> Tensor:
        """``M h`` of features, with a matrix ``[out, k]``."""
        return self.operator.mixed(self.layer, h, matrix)

    def take(self, y: Tensor, index: Tensor) -> Tensor:
        """Some features of an output."""
        return y.index_select(self.dim, index)

    def changed(self, x: Tensor, values: Mapping[str, Tensor], update: type[Update]) -> Tensor:
        """``W' x`` of any update: by its thin factors, or with W' itself where it has none.

        In a low precision W' would round a small change away: the change then has a product of its own.
        """
        made: Any = update(**self.indices, **values)
        weight = self.weight
        wide = next(iter(values.values())).dtype
        if update.has_factors():
            with without_autocast(weight):
                a, b = made.factors(weight, wide)
            y = self.base(x)
            return y + self.mixed(self.linear(x, a), b).to(y.dtype)
        with without_autocast(weight):
            change = made.delta(weight, dtype=wide)
        dtype = weight.dtype if self.looks_up else compute_dtype(x)
        if dtype in (torch.float32, torch.float64):
            return self.linear(x, weight.to(wide) + change)
        y = self.base(x)
        return y + self.linear(x, change).to(y.dtype)
