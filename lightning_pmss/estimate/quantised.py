"""Sizes of 4-bit weights of bitsandbytes."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import nn

from lightning_pmss.estimate.model import Piece
from lightning_pmss.layers.convertible import canonical_shape

BLOCK, SCALES = 64, 256  # weights per scale; scales per second-level scale


def quantised_bytes(numel: int) -> int:
    """Size of one matrix: 4 bits per weight, an 8-bit scale per block, a float32 per `SCALES` scales, and two tables.

    This is the layout of ``BitsAndBytesConfig(bnb_4bit_use_double_quant=True)``, which `CausalLMModule` uses.
    """
    blocks = math.ceil(numel / BLOCK)
    tables = 4 * (16 + 256 + 1)
    return math.ceil(numel / 2) + blocks + 4 * math.ceil(blocks / SCALES) + tables


def quantised_pieces(pieces: list[Piece], model: nn.Module) -> list[Piece]:
    """Return the list of tensors after transformers has quantised all linear layers except the output head."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    coded = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    return [
        replace(p, shape=(quantised_bytes(p.numel),), itemsize=1) if p.kind == "base" and p.name in coded else p
        for p in pieces
    ]


def largest_matrix(model: nn.Module, itemsize: int) -> int:
    """Size of the largest dequantised layer: bitsandbytes and `SliceReader` dequantise one layer at a time."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    return max((math.prod(canonical_shape(m)) for m in layers), default=0) * itemsize
