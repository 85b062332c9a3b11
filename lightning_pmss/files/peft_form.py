"""The adapter types of peft that an export can write: what one layer contains, and the fields of the config.

`LoraForm` serves every update, cut to a rank where it is no product of thin matrices. The other forms are peft's own types of
MiSS, BAT and HiRA, with the trained numbers as they are.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_pmss.files.lora_config import lora_fields
from lightning_pmss.files.lora_source import Layer, Source, no_thin_factors, thin
from lightning_pmss.files.peft_experts import experts_of, refuse_confused_experts
from lightning_pmss.layers.expert_layer import FUSED
from lightning_pmss.layers.layout import Layout
from lightning_pmss.methods.bat import BATUpdate
from lightning_pmss.methods.hira import HiRAUpdate
from lightning_pmss.methods.lora import LoRAUpdate, lora_pair
from lightning_pmss.methods.method import Update
from lightning_pmss.methods.miss import MiSSConfig, MiSSUpdate

_ENDS = ("lora_A.weight", "lora_B.weight")


class Part(NamedTuple):
    """The tensors of one layer by the ends of peft's keys.

    Attributes:
        tensors: Float64, or as trained.
        lost: Share of the update's norm that was cut off; None if nothing was.
    """

    tensors: dict[str, Tensor]
    lost: float | None = None


class PeftForm(ABC):
    """One adapter type of peft, for the layers of one export.

    Args:
        source: The adapter and its base.
    """

    name: ClassVar[str]
    """As people write it."""

    def __init__(self, source: Source) -> None:
        self.source = source

    @property
    def served(self) -> bool:
        """Whether vLLM reads it."""
        return False

    @property
    def for_peft(self) -> bool:
        """Whether peft reads it."""
        return True

    @classmethod
    def why_not(cls, source: Source) -> str | None:
        """Why peft cannot have this adapter in this form, behind "peft's <name>"; None if it can."""
        return None

    def names(self) -> list[str]:
        """What the file has tensors of: layers, and parameters of fused experts."""
        return list(self.source.layers)

    def place(self, name: str) -> str:
        """The name of the module that peft gives the tensors to."""
        return name

    def modules(self) -> list[str]:
        """Names of the modules that get tensors, for the config."""
        return [name for name in self.names() if name in self.source.layers]

    def layer(self, name: str) -> Layer:
        """The shape and the rank before a cut."""
        return self.source.layers[name]

    @abstractmethod
    def rank(self, name: str) -> int:
        """What the config says of the rank of a layer."""

    @abstractmethod
    def shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        """Shapes of a layer's tensors by the ends of peft's keys."""

    @abstractmethod
    def part(self, name: str) -> Part:
        """A layer's tensors.

        Raises:
            ValueError: Another base, or an update that this form cannot express.
        """

    @abstractmethod
    def fields(self, ranks: Mapping[str, int]) -> dict[str, Any]:
        """The fields of ``adapter_config.json`` that this type has beside those of every type."""


class LoraForm(PeftForm):
    """A LoRA. A parameter of fused experts has the tensors of all of them, as peft's ``target_parameters`` reads them.

    Args:
        source: The adapter and its base.
        cut: Largest rank; None: exact.
    """

    name = "LoRA"

    def __init__(self, source: Source, cut: int | None = None) -> None:
        super().__init__(source)
        self.cut = cut
        self.experts = experts_of(source.layers)

    @property
    def served(self) -> bool:
        return not self.experts and not self.source.applied()

    def names(self) -> list[str]:
        inside = {layer for group in self.experts.values() for layer in group}
        return [*(name for name in self.source.layers if name not in inside), *self.experts]

    def place(self, name: str) -> str:
        if name not in self.experts:
            return name
        # peft wraps a module once for each parameter, in their order, and the last wrapper is outermost.
        owner, _, key = name.rpartition(".")
        later = FUSED[FUSED.index(key) + 1 :]
        return owner + ".base_layer" * sum(f"{owner}.{other}" in self.experts for other in later)

    def layer(self, name: str) -> Layer:
        return self.source.layers[self.experts[name][0] if name in self.experts else name]

    def rank(self, name: str) -> int:
        full = max(self.source.layers[layer].rank for layer in self.experts.get(name, [name]))
        return min(full, self.cut or full)

    def shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        layer, rank = self.layer(name), self.rank(name)
        rank *= len(self.experts.get(name, [name]))
        ends = ("lora_embedding_A", "lora_embedding_B") if layer.layout is Layout.EMBEDDING else _ENDS
        kernel = layer.kernel or layer.shape[1:]
        return dict(zip(ends, ((rank, *kernel), (layer.shape[0], rank, *[1] * (len(kernel) - 1))), strict=True))

    def part(self, name: str) -> Part:
        if name not in self.experts:
            a, b, lost = self._pair(name, self.rank(name))
            shapes = self.shapes(name).items()
            return Part({end: factor.reshape(shape) for (end, shape), factor in zip(shapes, (a, b), strict=True)}, lost)
        pairs = [self._pair(layer, self.rank(name)) for layer in self.experts[name]]
        a = torch.cat([one for one, _, _ in pairs])  # rows: experts, then ranks
        b = torch.stack([one for _, one, _ in pairs], 2).flatten(1)  # columns: ranks, then experts
        cut = [lost for _, _, lost in pairs if lost is not None]
        return Part({"lora_A.weight": a, "lora_B.weight": b}, max(cut) if cut else None)

    def _pair(self, name: str, rank: int) -> tuple[Tensor, Tensor, float | None]:
        weight, update = self.source.weight(name), self.source.update(name)
        a, b, lost = lora_pair(thin(update, weight, name, self.cut is not None), rank)
        return F.pad(a, (0, 0, 0, rank - len(a))), F.pad(b, (0, rank - b.shape[1])), lost

    def fields(self, ranks: Mapping[str, int]) -> dict[str, Any]:
        found = lora_fields(ranks, transposed=self.source.transposed)
        return found | {"target_parameters": sorted(self.experts) or None}


class NativeForm(PeftForm):
    """A type of peft that means what the method means: the file has the trained numbers themselves."""

    def shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        return {end: tuple(t.shape) for end, t in self.tensors(self.source.update(name), name).items()}

    def part(self, name: str) -> Part:
        self.source.weight(name)  # refuses another base
        return Part(self.tensors(self.source.update(name), name))

    @abstractmethod
    def tensors(self, update: Any, name: str) -> dict[str, Tensor]:
        """A layer's tensors by the ends of peft's keys."""


class HiraForm(NativeForm):
    """peft's HIRA. It has no factor, so the scale is in ``hira_B``.

    peft 0.21 ignores ``rank_pattern`` here, so zeros fill up the layers of smaller ranks.
    """

    name = "HiRA"

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self.rows = max(source.update(name).rank for name in source.layers)

    def rank(self, name: str) -> int:
        return self.rows

    def tensors(self, update: HiRAUpdate, name: str) -> dict[str, Tensor]:
        more = self.rows - update.rank
        return {"hira_A": F.pad(update.A, (0, 0, 0, more)), "hira_B": F.pad(update.B, (0, more))}

    def fields(self, ranks: Mapping[str, int]) -> dict[str, Any]:
        return {
            "fan_in_fan_out": self.source.transposed,
            "hira_dropout": 0.0,
            "init_weights": True,
            "peft_type": "HIRA",
            "r": self.rows,
            "rank_pattern": {},
        }


class MissForm(NativeForm):
    """peft's MISS, which has one rank for all layers.

    Layers of several ranks get their least common multiple: repeating the rows of D changes nothing.
    """

    name = "MiSS"

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        shapes = {name: source.update(name).D.shape for name in source.layers}  # type: ignore[attr-defined]
        self.rows, columns = math.lcm(*(rows for rows, _ in shapes.values())), {m for _, m in shapes.values()}
        options = source.options
        self.dropout, mini = (options.dropout, options.mini_rank) if isinstance(options, MiSSConfig) else (0.0, None)
        self.mini = columns.pop() if mini is not None and len(columns) == 1 else None

    @classmethod
    def why_not(cls, source: Source) -> str | None:
        if reason := _why_no_miss(source):
            return reason
        rows = math.lcm(*(source.update(name).rank for name in source.layers))
        width, name = min((layer.shape[1], name) for name, layer in source.layers.items())
        if rows > width:
            return (
                f"has one rank for all layers, and the ranks of this adapter ({_listed(source)}) have no common multiple up to"
                f" {width}, the inputs of {name}"
            )
        return None

    def rank(self, name: str) -> int:
        return self.rows

    def tensors(self, update: MiSSUpdate, name: str) -> dict[str, Tensor]:
        rows, columns = update.D.shape
        wanted = self.mini or self.source.layers[name].shape[0]
        return {"miss_block": update.D.repeat(self.rows // rows, wanted // columns)}

    def fields(self, ranks: Mapping[str, int]) -> dict[str, Any]:
        init = True if self.mini is None else "mini"
        return _miss_fields(self.rows, init) | {"mini_r": self.mini or 1, "miss_dropout": self.dropout}


class BatForm(NativeForm):
    """peft's MISS with ``init_weights="bat"``: the column form, of one rank that divides both sides of every layer."""

    name = "BAT"

    @classmethod
    def why_not(cls, source: Source) -> str | None:
        if reason := _why_no_miss(source):
            return reason
        ranks = {name: source.update(name).rank for name in source.layers}
        if len(set(ranks.values())) > 1:
            return f"has one rank for all layers, and this adapter has several ({_listed(source)})"
        for name, layer in source.layers.items():
            if any(side % ranks[name] for side in layer.shape):
                return (
                    f"needs a rank that divides both sides of every layer, and that of {name} is {ranks[name]}, its weight"
                    f" {list(layer.shape)}"
                )
        return None

    def rank(self, name: str) -> int:
        return self.source.update(name).rank

    def tensors(self, update: BATUpdate, name: str) -> dict[str, Tensor]:
        return {"miss_block": update.B.unflatten(0, (-1, update.rank))}

    def fields(self, ranks: Mapping[str, int]) -> dict[str, Any]:
        return _miss_fields(max(ranks.values()), "bat")


NATIVE: Mapping[type[Update], type[PeftForm]] = {
    LoRAUpdate: LoraForm,
    MiSSUpdate: MissForm,
    BATUpdate: BatForm,
    HiRAUpdate: HiraForm,
}
"""peft's type for an update. A subclass is another update, so it is not looked up by its bases."""


@dataclass(frozen=True)
class Chosen:
    """The form of an export.

    Attributes:
        form: The form.
        instead: Why it is a LoRA although nobody asked for one; None where it is peft's own type, or was asked for.
    """

    form: PeftForm
    instead: str | None = None


def choose_form(source: Source, native: bool | None, rank: int | None) -> Chosen:
    """Choose the form that an adapter is exported in.

    Args:
        source: The adapter and its base.
        native: True: peft's own type of the method. False: a LoRA. None: the first where it can express the adapter, else the
            second; a LoRA if there is a rank.
        rank: Rank to cut a LoRA to.

    Raises:
        ValueError: peft's own type is asked for and there is none, or a rank with it; or nothing is asked for and neither form
            can express the adapter.
    """
    refuse_confused_experts(source.layers)
    if native is False or (native is None and rank is not None):
        return Chosen(LoraForm(source, rank))
    kind = type(source.update(next(iter(source.layers))))
    form, label = NATIVE.get(kind), source.options.label()
    if form is not LoraForm and (special := source.lora_only()) is not None:
        if native or form is not None and kind.factors is Update.factors:
            raise ValueError(
                f"{special}. Export a LoRA (--as lora, or native=False in Python; with a rank, where the update is no product"
                " of thin matrices), or merge."
            )
        form = None
    if native and rank is not None:
        raise ValueError(f"rank={rank} cuts a LoRA, and peft's own type of {label} is asked for. Give one of the two.")
    reason = f"peft has no type for the updates of {label}"
    if form is not None:
        why = form.why_not(source)
        if why is None:
            return Chosen(form(source))
        reason = f"peft's {form.name} {why}"
    if native:
        raise ValueError(f"{reason}. Export it as a LoRA instead: --as lora, or native=False in Python.")
    if kind.factors is Update.factors:
        raise ValueError(f"{reason}; and {no_thin_factors('the adapter')}")
    return Chosen(LoraForm(source), reason if form is not None else None)


def _why_no_miss(source: Source) -> str | None:
    if found := next((name for name, layer in source.layers.items() if layer.layout is Layout.CONV1D), None):
        return f"takes nn.Linear only, and {found} is a Conv1D"
    return None


def _listed(source: Source) -> str:
    ranks: Collection[int] = {source.update(name).rank for name in source.layers}
    return ", ".join(map(str, sorted(ranks)))


def _miss_fields(rank: int, init: bool | str) -> dict[str, Any]:
    return {"bias": "none", "init_weights": init, "mini_r": 1, "miss_dropout": 0.0, "peft_type": "MISS", "r": rank}
