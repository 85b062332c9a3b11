"""Matrices that are parameters of a module which is no linear layer, such as ``in_proj_weight`` of ``nn.MultiheadAttention``.

Each is presented as a linear layer: a module that owns nothing, is in no model's tree, and whose ``weight`` is the parameter.
Everything that treats a layer for itself (selection, updates, adapter files, merging, reports) then treats the parameter. The
forward pass is that of the module which owns it, with W' in the parameter's place (`lightning_pmss.layers.matrices`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from lightning_pmss.layers.parts import is_dtensor, is_zero_partitioned, whole_shape
from lightning_pmss.layers.products import FLOATS

KEPT = "pmss_matrices"  # attribute of a module in which its converted matrices are, by name of the parameter


class OwnedLinear(nn.Linear):
    """A matrix in a parameter of another module, as a linear layer without a bias.

    Attributes:
        owner: The module that has the parameter.
        key: The parameter's name.
    """

    owner: Any
    key: str

    def __init__(self, owner: nn.Module, key: str, sides: tuple[int, int]) -> None:
        nn.Module.__init__(self)
        self.__dict__["owner"] = owner  # not a child: the owner would be walked from inside itself
        self.key = key
        self.out_features, self.in_features = sides
        self.register_parameter("bias", None)

    @property
    def own_name(self) -> str:
        """The layer's name behind the owner's."""
        return self.key

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The owner's parameter."""
        yield self.owner._parameters[self.key]


class MatrixLinear(OwnedLinear):
    """A parameter of two dimensions. W is ``[out, in]`` as it is stored, whatever the owner multiplies with it."""

    def __init__(self, owner: nn.Module, key: str) -> None:
        out, inputs = whole_shape(owner._parameters[key])  # type: ignore[arg-type]
        super().__init__(owner, key, (out, inputs))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The parameter."""
        found: Tensor = self.owner._parameters[self.key]
        return found

    def why_unusable(self) -> str | None:
        """Why the parameter cannot be converted, a sentence without its full stop; None if it can."""
        parameter = self.owner._parameters[self.key]
        if parameter.dtype not in FLOATS:
            return f"it is kept in codes ({str(parameter.dtype).removeprefix('torch.')}), which lightning-pmss does not read"
        if is_dtensor(parameter) or is_zero_partitioned(parameter):
            return "it is sharded already"
        return None


def why_no_matrix(module: nn.Module, key: str) -> str | None:
    """Why no W' can take the place of a parameter of a module that is no linear layer; None if one can.

    Returns:
        Words behind "a parameter [..] of the X".
    """
    dims = len(whole_shape(module._parameters[key]))  # type: ignore[arg-type]
    if dims < 2:
        return f"An update changes a matrix; this has {dims} dimension(s)"
    if dims > 2:
        return "Of parameters with more than two dimensions, those of transformers' fused experts are converted"
    if isinstance(module, nn.EmbeddingBag):
        return "It is a table of which rows are read, not a matrix of a product"
    if isinstance(module, (nn.ParameterList, nn.ParameterDict, ParametrizationList)) or _has_no_forward(module):
        return "Its module is a container without a forward pass of its own, in which W' could take its place"
    return None


def _has_no_forward(module: nn.Module) -> bool:
    return type(module).forward is nn.Module.forward


def holder(module: nn.Module) -> nn.Module:
    """The module of the model that a layer is part of: of a matrix in another module's parameter, that module."""
    return module.owner if isinstance(module, OwnedLinear) else module
