"""Which layers can be converted: those that own a plain weight, or linear layers in codes that are known."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_pmss.layers.expert_layer import ExpertLinear
from lightning_pmss.layers.layout import Layout
from lightning_pmss.layers.matrix_layer import MatrixLinear
from lightning_pmss.layers.operators import operator_of, why_not_applied
from lightning_pmss.layers.parts import is_dtensor, whole_shape
from lightning_pmss.layers.products import FLOATS
from lightning_pmss.layers.quantised import is_quantised, why_unusable


def is_conv1d(layer: nn.Module) -> bool:
    """Whether this is transformers' ``Conv1D`` (recognised by name, since the core never imports transformers)."""
    return any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(layer).__mro__)


def is_linear(layer: nn.Module) -> bool:
    """Whether this is a linear layer of the kinds that are converted, whatever its weight is."""
    return isinstance(layer, nn.Linear) or is_conv1d(layer)


def is_known(layer: nn.Module) -> bool:
    """Whether this is a layer of a kind that is converted: linear, or a convolution or an embedding that is named."""
    return is_linear(layer) or operator_of(layer) is not None


def is_supported(layer: nn.Module) -> bool:
    """Whether `AdaptedLinear.adopt` can convert this layer: of a kind that is known, with a floating-point weight."""
    if not is_known(layer) or isinstance(layer, nn.modules.lazy.LazyModuleMixin):
        return False
    if operator_of(layer) is not None:
        return why_not_applied(layer) is None and why_no_own_weight(layer) is None and layer.weight.dtype in FLOATS  # type: ignore[union-attr]
    if is_quantised(layer) or why_unusable(layer):
        return why_unusable(layer) is None
    if why_no_own_weight(layer):
        return False
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight.dtype in FLOATS and len(whole_shape(weight)) == 2


def has_known_forward(layer: nn.Module) -> bool:
    """Whether the base's forward is torch's own, or ``Conv1D``'s."""
    base = getattr(layer, "base_class", type(layer))
    return base.forward is nn.Linear.forward or is_conv1d(layer) or operator_of(layer) is not None


def has_own_product(layer: Any, *dtypes: torch.dtype) -> bool:
    """Whether a method can do a converted layer's product itself: a frozen weight, a known forward, one dtype throughout."""
    weight = layer.weight
    known = has_known_forward(layer) and not layer.quantised
    return known and not weight.requires_grad and all(d == weight.dtype for d in dtypes)


def why_no_own_weight(layer: nn.Module) -> str | None:
    """What this layer's ``weight`` is instead of a parameter that it owns and stores as W; None if it is that.

    A conversion keeps W where it is and adds to what its product gives. It needs the one tensor that the product uses, which
    nothing computes anew, replaces or prunes. Codes that `lightning_pmss.layers.quantised` reads or refuses are not looked at.

    Returns:
        A sentence without its full stop.
    """
    if not is_known(layer) or isinstance(layer, nn.modules.lazy.LazyModuleMixin):
        return None
    if isinstance(layer, (ExpertLinear, MatrixLinear)):
        return layer.why_unusable()
    if is_linear(layer) and (is_quantised(layer) or why_unusable(layer)):
        return None
    own = layer._parameters.get("weight")
    if is_parametrized(layer, "weight"):
        rules = ", ".join(type(rule).__name__.lstrip("_") for rule in layer.parametrizations["weight"])  # type: ignore[union-attr, index]
        return f"its weight is computed by a parametrisation ({rules})"
    for extra, rule in (("weight_g", "weight_norm"), ("weight_mask", "pruning"), ("weight_orig", "spectral_norm")):
        if own is None and (extra in layer._parameters or extra in layer._buffers):
            return f"its weight is computed by {rule} before each pass"
    if own is None:
        if "weight" in layer._buffers and layer._buffers["weight"] is not None:
            return "its weight is a buffer, not a parameter"
        return (
            "its weight is no parameter of the layer"
            if getattr(layer, "weight", None) is not None
            else "it has no weight"
        )
    if layer.weight is not own:
        return f"its weight is computed by {type(layer).__name__}"
    if own.layout is not torch.strided:
        return f"its weight is stored in the layout {str(own.layout).removeprefix('torch.')}"
    if not _is_plain(own) and not is_dtensor(own):
        return f"its weight is a {type(own).__name__}, whose numbers cannot be read row by row"
    return None


def _is_plain(weight: Tensor) -> bool:
    """Whether operations on this tensor are torch's own; the fake tensors of an estimate count as such."""
    own = type(weight).__torch_dispatch__
    fake = any(c.__name__ == "FakeTensor" for c in type(weight).__mro__)
    return fake or own is Tensor.__torch_dispatch__ or own is nn.Parameter.__torch_dispatch__


def layout_of(layer: nn.Module) -> Layout:
    """How the layer stores W."""
    if (operator := operator_of(layer)) is not None:
        return Layout.EMBEDDING if operator.looks_up else Layout.CONVOLUTION
    if isinstance(layer, MatrixLinear):
        return Layout.PARAMETER
    return Layout.CONV1D if is_conv1d(layer) else Layout.LINEAR


def canonical_shape(layer: nn.Module) -> tuple[int, int]:
    """``(out, in)`` from the layer's attributes, never from ``weight.shape``, which sharding engines empty."""
    if (operator := operator_of(layer)) is not None:
        return operator.shape(layer)
    if is_conv1d(layer):
        return int(layer.nf), int(layer.nx)  # type: ignore[arg-type]
    return int(layer.out_features), int(layer.in_features)  # type: ignore[arg-type]


def kept_shape(layer: nn.Module) -> tuple[int, int]:
    """``(out, in)`` for `Method.kept_per_token`: of a convolution, the numbers for each place of its output."""
    out, inp = canonical_shape(layer)
    operator = operator_of(layer)
    return (out, inp) if operator is None else (out, operator.inputs(layer))
