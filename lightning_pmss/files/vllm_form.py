"""A LoRA as vLLM reads it: of fused experts, each expert's gate, up and down under the names of the base's files.

vLLM looks for these names (`process_packed_modules_mapping`, `pack_moe` and `LoRAModel` in its `vllm/lora`), and asks for all
three of every expert of a layer that has any. Gate and up are rows of one matrix here, so they share A. A part of which the
adapter has nothing is zero. peft 0.21 reads these names, too, as those of an older transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_pmss.files.lora_config import lora_fields
from lightning_pmss.files.lora_source import Layer, Source
from lightning_pmss.files.peft_experts import confused_layer
from lightning_pmss.files.peft_form import LoraForm, Part
from lightning_pmss.layers.expert_layer import FUSED, parameter_name
from lightning_pmss.layers.layout import Layout

_ENDS = ("lora_A.weight", "lora_B.weight")


@dataclass(frozen=True)
class _Rows:
    """Rows of one expert's matrix, under a name of their own.

    Attributes:
        layer: The matrix, by the name of its layer.
        known: A converted layer of the same parameter, or of the other one, for the rank.
        rows: Which of its rows.
        inputs: Its number of columns.
    """

    layer: str
    known: str
    rows: slice
    inputs: int


class VllmForm(LoraForm):
    """A LoRA with the names that vLLM has for experts.

    Args:
        source: The adapter and its base.
        cut: See `LoraForm`.

    Raises:
        ValueError: The base's files keep experts in one tensor, or none of their names are known; convolutions or embeddings.
    """

    def __init__(self, source: Source, cut: int | None = None) -> None:
        super().__init__(source, cut)
        if applied := source.applied():
            raise ValueError(
                f"{applied[0]} is a convolution or an embedding, and vLLM is not known to read a LoRA of such layers. Merge"
                " instead: `python -m lightning_pmss merge`; or export for peft: --format peft."
            )
        self.rows: dict[str, _Rows] = {}
        groups: dict[str, dict[str, list[str]]] = {}
        for name, layers in self.experts.items():
            owner, _, key = name.rpartition(".")
            groups.setdefault(owner, {})[key] = layers
        for owner, own in groups.items():
            self._add(owner, own)

    def _add(self, owner: str, own: Mapping[str, list[str]]) -> None:
        some = next(iter(own.values()))
        for index in range(len(some)):
            found = 0
            for key in FUSED:
                layer = f"{owner}.{key}.{index}"
                if (parts := self.source.apart(layer)) is None:
                    raise ValueError(
                        f"{parameter_name(layer)}: the base's files keep the experts of this model in one tensor, so no names"
                        " of single experts are known. vLLM reads peft's form of such models, if it reads any: export with"
                        " --format peft, or merge."
                    )
                start, found = 0, found + len(parts)
                known = own[key][index] if key in own else some[index]
                for name, (rows, inputs) in parts.items():
                    self.rows[name] = _Rows(layer, known, slice(start, start + rows), inputs)
                    start += rows
            if found != 3:
                raise ValueError(
                    f"{owner}: its experts have {found} matrices each, and vLLM's form is of three (gate, up, down). Merge"
                    " instead: `python -m lightning_pmss merge`."
                )

    @property
    def served(self) -> bool:
        return True

    @property
    def for_peft(self) -> bool:
        return confused_layer(self.source.layers) is None

    def names(self) -> list[str]:
        inside = {layer for group in self.experts.values() for layer in group}
        return [*(name for name in self.source.layers if name not in inside), *self.rows]

    def modules(self) -> list[str]:
        return self.names()

    def place(self, name: str) -> str:
        return name

    def layer(self, name: str) -> Layer:
        if name not in self.rows:
            return self.source.layers[name]
        own = self.rows[name]
        shape = own.rows.stop - own.rows.start, own.inputs
        return Layer(shape, Layout.LINEAR, self.source.layers[own.known].rank)

    def rank(self, name: str) -> int:
        return super().rank(name) if name not in self.rows else super().rank(parameter_name(self.rows[name].known))

    def shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        (out, inp), rank = self.layer(name).shape, self.rank(name)
        return dict(zip(_ENDS, ((rank, inp), (out, rank)), strict=True))

    def part(self, name: str) -> Part:
        if name not in self.rows:
            return super().part(name)
        own = self.rows[name]
        if own.layer not in self.source.layers:
            return Part({end: torch.zeros(shape, dtype=torch.float64) for end, shape in self.shapes(name).items()})
        a, b, lost = self._pair(own.layer, self.rank(name))
        values: tuple[Tensor, Tensor] = (a, b[own.rows])
        return Part(dict(zip(_ENDS, values, strict=True)), lost)

    def fields(self, ranks: Mapping[str, int]) -> dict[str, Any]:
        return lora_fields(ranks, transposed=self.source.transposed)
