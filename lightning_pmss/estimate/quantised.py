"""What 4-bit codes of bitsandbytes take in the place of weights."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import nn

from lightning_pmss.estimate.model import Piece
from lightning_pmss.layers.convertible import canonical_shape

QUANTISATIONS = ("nf4", "fp4")
STRATEGIES = ("single", "ddp")  # codes cannot be kept in parts
BLOCK, SCALES = 64, 256  # weights with one scale; scales with one scale of their own


def quantised_bytes(numel: int) -> int:
    """Of one matrix: a code of 4 bits per weight, one of 8 bits per block, float32 per block of blocks, and two tables.

    As ``BitsAndBytesConfig(bnb_4bit_use_double_quant=True)`` makes them, which is what `CausalLMModule` asks for.
    """
    blocks = math.ceil(numel / BLOCK)
    tables = 4 * (16 + 256 + 1)
    return math.ceil(numel / 2) + blocks + 4 * math.ceil(blocks / SCALES) + tables


def quantised_pieces(pieces: list[Piece], model: nn.Module) -> list[Piece]:
    """The list of a model's tensors after transformers has put codes in the place of all linear layers but the output head."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    coded = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    return [
        replace(p, shape=(quantised_bytes(p.numel),), itemsize=1) if p.kind == "base" and p.name in coded else p
        for p in pieces
    ]


def largest_matrix(model: nn.Module, itemsize: int) -> int:
    """Bytes of the largest linear layer made whole: bitsandbytes and `SliceReader` do so for a moment, one layer at a time."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    return max((math.prod(canonical_shape(m)) for m in layers), default=0) * itemsize
