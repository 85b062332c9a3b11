"""Quantised linear layers: which are known, and the W that their own product uses.

A quantised layer stays a black box that computes ``y = W x`` from codes and scales. What PMSS needs beside it are slices of
that same W, so they are read out of the codes, never out of the checkpoint that the codes were made from. Known:

    bitsandbytes  ``Linear4bit`` (nf4, fp4, also with quantised scales), ``Linear8bitLt`` (codes only)
    torchao       weight-only tensors with a ``dequantize`` of their own: ``Int8Tensor``, ``IntxUnpackedToInt8Tensor``, ...

Neither library is imported here: a layer of theirs can only be at hand where they were imported before.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pmss.layers.expert_layer import ExpertLinear, whole_parameter
from lightning_pmss.layers.parts import is_dtensor, whole

SUPPORTED = "bitsandbytes 4-bit and 8-bit, and torchao weight-only int8 and int4 tensors that can dequantise themselves"


def quantisation_of(layer: nn.Module, weight: Tensor | None = None) -> str | None:
    """How the layer's weight is kept, such as ``"bitsandbytes nf4"``; None for a plain (or unknown) one.

    weight: What the layer holds at other times; default: ``layer.weight``.
    """
    weight = layer._parameters.get("weight") if weight is None else weight  # never `layer.weight`: that may compute it
    if not isinstance(weight, Tensor):
        return None
    if (state := _state_4bit(weight)) is not None:
        return f"bitsandbytes {state.quant_type}"
    if _is_int8_code(weight):
        return "bitsandbytes int8"
    if _is_torchao(weight):
        return f"torchao {type(weight).__name__}"
    return None


def is_quantised(layer: nn.Module) -> bool:
    """Whether the layer's weight is kept in codes that this module can read."""
    return quantisation_of(layer) is not None and why_unusable(layer) is None


def why_unusable(layer: nn.Module) -> str | None:
    """Why a layer of a quantisation library cannot be converted, with the remedy; None where it can, or is a plain one."""
    weight = layer._parameters.get("weight")
    kind = type(layer).__name__
    if isinstance(weight, Tensor):
        if (state := _state_4bit(weight)) is not None:
            if getattr(state, "packing_format_for_cpu", False):
                return (
                    "was packed for inference by a forward pass in evaluation mode, which rounded its scales and lets no"
                    " gradient through; load the model anew and convert it before its first use."
                )
            return None
        if _is_class(weight, "bitsandbytes.", "Params4bit"):
            return "has no codes yet; move the model to its device first: `model.to(device)` quantises it."
        if _is_class(weight, "bitsandbytes.", "Int8Params") and not _is_int8_code(weight):
            return (
                "keeps floating-point weights and quantises them in each forward pass (has_fp16_weights), or was not moved to"
                " its device yet; load the model with load_in_8bit=True."
            )
        if _is_int8_code(weight):
            return None
        if _is_class(weight, "torchao.", ""):
            if getattr(weight, "act_quant_kwargs", None) or getattr(weight, "activation_quantization", None):
                return "quantises activations too, which lets no gradient through; use a weight-only configuration."
            if not _is_torchao(weight):
                return f"keeps a {type(weight).__name__}, which cannot be dequantised. Supported: {SUPPORTED}."
            return None
    known = isinstance(layer, nn.Linear) and isinstance(weight, Tensor) and weight.is_floating_point()
    if not known and any(hasattr(layer, name) for name in ("qweight", "W_q", "qzeros")):
        return f"is a {kind}: GPTQ, AWQ, HQQ and the like are not supported. Supported: {SUPPORTED}."
    return None


@torch.no_grad()
def dequantised(layer: nn.Module, weight: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """W ``[out, in]`` as the layer's product uses it, newly made.

    Args:
        layer: See `is_quantised`.
        weight: The codes, where the layer does not hold them at present; default: ``layer.weight``.
        dtype: Of the result. The libraries multiply codes and scales in float32 and round once to the dtype in which they
            compute; with that dtype the result equals what they use bit for bit.
    """
    weight = layer.weight if weight is None else weight  # type: ignore[assignment]
    assert isinstance(weight, Tensor)
    if is_dtensor(weight):
        raise ValueError(f"a quantised {type(layer).__name__} kept in parts cannot be read; use one device or DDP.")
    if (state := _state_4bit(weight)) is not None:
        from bitsandbytes.functional import dequantize_4bit

        wide = copy.copy(state)
        wide.dtype = dtype
        dense: Tensor = dequantize_4bit(weight.data, wide)
        return dense
    if _is_int8_code(weight):
        return _int8_values(weight.data, _int8_scales(layer, weight), dtype)
    if not _is_torchao(weight):
        raise ValueError(
            f"the {type(weight).__name__} of a {type(layer).__name__} is not kept in codes that are known."
        )
    if "output_dtype" in _arguments(weight):
        return weight.dequantize(output_dtype=torch.float32).to(dtype)  # type: ignore[call-arg]
    return weight.dequantize().to(dtype)


@torch.no_grad()
def dequantised_slice(layer: nn.Module, index: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Rows (dim 0) or columns (dim 1) of W, bit for bit those of `dequantised`.

    Only these are made of int8 codes of bitsandbytes, and rows of 4-bit ones whose blocks do not cross rows; else W is made
    whole for a moment (for columns of 4-bit codes that is also the faster way, measured on the CPU).
    """
    weight: Any = layer.weight
    if _is_int8_code(weight):
        scales = _int8_scales(layer, weight)
        codes = weight.data.index_select(dim, index)
        return _int8_values(codes, scales.index_select(0, index) if dim == 0 else scales, dtype)
    state = _state_4bit(weight)
    if state is not None and dim == 0 and state.shape[1] % state.blocksize == 0:
        return _rows_4bit(weight, state, index, dtype)
    return dequantised(layer, dtype=dtype).index_select(dim, index)


class SliceReader:
    """Stands in for the weight in an edit: gives the slices of a quantised layer when they are asked for."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def slice(self, index: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
        return dequantised_slice(self.layer, index, dim, dtype)


@contextmanager
def whole_weight(layer: nn.Module, weight: Tensor | None = None) -> Iterator[Tensor]:
    """The layer's weight whole and detached, dequantised if need be, in the layout in which the layer keeps it.

    weight: What the layer holds at other times; default: ``layer.weight``.
    """
    if isinstance(layer, ExpertLinear) and layer.in_parts:
        with whole_parameter(layer):
            yield layer.weight.detach()
        return
    weight = layer.weight if weight is None else weight  # type: ignore[assignment]
    if getattr(layer, "quantised", False) or is_quantised(layer):
        yield dequantised(layer, weight)
    else:
        with whole(weight) as found:  # type: ignore[arg-type]
            yield found


def value_dtype(layer: nn.Module) -> torch.dtype:
    """The dtype of the weights that the codes were made from, in which a dense W' is written; a plain weight's own."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    if (state := _state_4bit(weight)) is not None:
        found: torch.dtype = state.dtype
        return found
    return weight.dtype if weight.is_floating_point() else getattr(layer, "pmss_values", torch.float16)


def can_requantise(layer: nn.Module) -> bool:
    """Whether `requantised` can make codes for this layer."""
    return quantisation_of(layer) in ("bitsandbytes nf4", "bitsandbytes fp4")


def requantised(layer: nn.Module, dense: Tensor) -> nn.Parameter:
    """Codes of a dense W ``[out, in]``, made as those of this 4-bit layer were."""
    codes: Any = layer.weight
    options = {
        name: getattr(codes, name) for name in ("blocksize", "compress_statistics", "quant_type", "quant_storage")
    }
    made = type(codes)(dense.to("cpu"), requires_grad=False, **options)  # quantises when it is moved to a device
    moved: nn.Parameter = made.to(codes.device)
    return moved


def hidden_values(model: nn.Module) -> int:
    """How many weights the parameters of quantised layers stand for beyond their elements (two 4-bit codes a byte)."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and is_quantised(m)]
    return sum(m.out_features * m.in_features - m.weight.numel() for m in layers)


def prepare(model: nn.Module) -> None:
    """What the quantised layers of a model need before they are trained through.

    bitsandbytes packs 4-bit weights for CPU inference at the first pass in evaluation mode: the scales are rounded, and from
    then on no gradient comes through, also not when training goes on after a validation. It is kept from that. Its int8
    layers do not know what dtype they were made from: it is taken from the model's first parameter of a floating dtype.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float16)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        if isinstance(module, nn.Linear) and quantisation_of(module) == "bitsandbytes int8":
            module.pmss_values = dtype  # type: ignore[assignment]


def _is_class(value: object, package: str, name: str) -> bool:
    return any(c.__module__.startswith(package) and c.__name__.startswith(name) for c in type(value).__mro__)


def _state_4bit(weight: Tensor) -> Any:
    return getattr(weight, "quant_state", None) if _is_class(weight, "bitsandbytes.", "Params4bit") else None


def _is_int8_code(weight: Tensor) -> bool:
    return weight.dtype == torch.int8 and _is_class(weight, "bitsandbytes.", "Int8Params")


def _is_torchao(weight: Tensor) -> bool:
    own = next((c for c in type(weight).__mro__ if "dequantize" in c.__dict__), Tensor)
    return _is_class(weight, "torchao.", "") and own.__module__.startswith("torchao.") and weight.dim() == 2


def _arguments(weight: Tensor) -> tuple[str, ...]:
    code = getattr(type(weight).dequantize, "__code__", None)
    return () if code is None else code.co_varnames[: code.co_argcount]


def _int8_scales(layer: nn.Module, weight: Tensor) -> Tensor:
    """``[out]``: with the weight until the first forward pass, from then on in the layer's state."""
    scales = getattr(weight, "SCB", None)
    found: Tensor = layer.state.SCB if scales is None else scales  # type: ignore[union-attr, assignment]
    return found


def _int8_values(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.to(torch.float32).mul_(scales.unsqueeze(1).mul(1.0 / 127.0)).to(dtype)


def _rows_4bit(weight: Tensor, state: Any, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of 4-bit codes: whole blocks of them, so that the library's own function does the rest."""
    from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise

    out_features, in_features = state.shape
    codes = weight.data.view(torch.uint8).view(out_features, in_features // 2).index_select(0, rows)
    scales = state.absmax
    if state.nested:
        scales = dequantize_blockwise(scales, state.state2) + state.offset
    part = QuantState(
        absmax=scales.float().view(out_features, -1).index_select(0, rows).reshape(-1),
        shape=torch.Size((len(rows), in_features)),
        code=state.code,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        dtype=dtype,
    )
    dense: Tensor = dequantize_4bit(codes.reshape(-1, 1), part)
    return dense
