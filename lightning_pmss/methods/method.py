"""What a method is: the mathematics of one adapted linear layer, and nothing else.

A method says which tensors it trains, which frozen ones it derives from W, and which change of W they mean: an `Update`.
Conversion, checkpoints, gathering, adapter files, merging and export are written once, against the classes here. Shapes are
canonical: W is ``[out, in]``, whatever the layer stores.
"""

from __future__ import annotations

import enum
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Generic, NamedTuple, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_pmss.layers.adapted import AdaptedLinear
from lightning_pmss.layers.adapter import Adapter
from lightning_pmss.layers.applied import AppliedLayer
from lightning_pmss.layers.expert_stack import GroupedLayer
from lightning_pmss.methods.config import AdapterConfig
from lightning_pmss.methods.given import Given

Shape = tuple[int, int]
ALL = slice(None)


class Kind(enum.Enum):
    """What becomes of a tensor of a layer."""

    TRAINED = enum.auto()
    FROZEN = enum.auto()
    INDEX = enum.auto()


class Spec(NamedTuple):
    """A tensor of a layer, as it is known before W is.

    Attributes:
        shape: Its shape.
        kind: Trained and frozen tensors are float32 (float64 on a float64 base), indices are int64.
        below: What the numbers of an index stay below.
    """

    shape: tuple[int, ...]
    kind: Kind
    below: int = 0


class Factors(NamedTuple):
    """The product ``b @ a`` of two thin matrices.

    Attributes:
        a: ``[k, in]``.
        b: ``[out, k]``.
    """

    a: Tensor
    b: Tensor


@dataclass(frozen=True)
class Update(ABC):
    """The change of one layer's weight as an adapter file stores it, with the scale folded in.

    A subclass is a frozen dataclass of tensors; the file uses the names of its fields. It defines `factors` where the change
    has a low rank, else `delta`.

    Attributes:
        bound_to_base: Whether it means nothing without what it reads of W, so that its base must be proven.
    """

    bound_to_base: ClassVar[bool] = False

    def tensors(self) -> dict[str, Tensor]:
        """The tensors under the names of the file; indices are int64."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def numbers(self) -> dict[str, Tensor]:
        """Those of them that are no indices."""
        return {name: value for name, value in self.tensors().items() if value.is_floating_point()}

    def indices(self) -> dict[str, Tensor]:
        """Those that are: int64."""
        return {name: value for name, value in self.tensors().items() if not value.is_floating_point()}

    def to(self, device: torch.device | str) -> Self:
        """The same on a device."""
        return type(self)(**{name: value.to(device) for name, value in self.tensors().items()})

    def stored(self) -> Self:
        """The same as a file holds it: on the CPU, float32 or float64."""
        made = {name: value.cpu() for name, value in self.tensors().items()}
        low = {n: t for n, t in made.items() if t.is_floating_point() and t.dtype != torch.float64}
        made |= {name: value.to(torch.float32) for name, value in low.items()}
        return type(self)(**made)

    def cloned(self) -> Self:
        """The same in memory of its own."""
        return type(self)(**{name: value.clone() for name, value in self.tensors().items()})

    def read(self, weight: Tensor) -> tuple[Tensor, ...]:
        """What this update reads of W ``[out, in]``, in its dtype; nothing where it is not bound to a base."""
        own = {name: index.to(weight.device) for name, index in self.indices().items()}
        return self.reads(weight, own) if self.bound_to_base else ()

    @property
    @abstractmethod
    def rank(self) -> int:
        """Largest rank that the update can have; for methods without one, what the file calls the rank."""

    @property
    def ranks(self) -> int | list[int]:
        """What the file calls the rank of the layer: several numbers where the update has several."""
        return self.rank

    @property
    def width(self) -> int:
        """The rank that a layer must have to take it."""
        return max(self.ranks) if isinstance(self.ranks, list) else self.ranks

    @classmethod
    @abstractmethod
    def weighted(cls, updates: Sequence[tuple[float, Self]]) -> Self:
        """The weighted sum of updates of one W, exactly; of a rank up to the sum of theirs."""

    def trimmed(self) -> Self:
        """The same without parts that are zero."""
        return self

    def narrowed(self, shape: Shape) -> Self:
        """The same of a rank that W ``[out, in]`` of this shape allows, for updates that others made."""
        return self

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Of the tensors, in the order of the fields."""
        return tuple(field.name for field in fields(cls))

    @classmethod
    @abstractmethod
    def why_not(cls, shape: Shape, tensors: Mapping[str, Tensor]) -> str | None:
        """Why tensors, under these names and finite, are no update of a weight of this shape; None if they are."""

    @classmethod
    def reads(cls, weight: Tensor, indices: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """The part of W ``[out, in]`` that an update with these indices reads: what a fingerprint hashes."""
        return ()

    def factors(self, weight: Tensor, dtype: torch.dtype) -> Factors | None:
        """The change as an exact product of thin matrices of a dtype; None where there is none.

        Args:
            weight: W ``[out, in]``, in its own dtype; not changed.
            dtype: Of the factors and of all products in them.
        """
        return None

    @classmethod
    def has_factors(cls) -> bool:
        """Whether `factors` gives any."""
        return cls.factors is not Update.factors

    def delta(self, weight: Tensor, rows: slice = ALL, dtype: torch.dtype | None = None) -> Tensor:
        """``(W' - W)[rows]``, computed in `dtype` (default: W's); W ``[out, in]`` is not changed."""
        factors = self.factors(weight, dtype or weight.dtype)
        assert factors is not None, f"{type(self).__name__} must define factors or delta"
        return factors.b[rows] @ factors.a

    def bound(self, weight: Tensor) -> float:
        """A number that no entry of the change exceeds, from norms alone."""
        factors = self.factors(weight, torch.float64)
        assert factors is not None, f"{type(self).__name__} must define factors or bound"
        return math.prod(float(torch.linalg.vector_norm(part)) for part in factors)


def why_misshapen(tensors: Mapping[str, Tensor], expected: Mapping[str, Sequence[int]]) -> str | None:
    """Why tensors are not float32 or float64 numbers of these shapes, by name; None if they are."""
    for name, shape in expected.items():
        tensor = tensors[name]
        if tensor.dtype not in (torch.float32, torch.float64) or list(tensor.shape) != list(shape):
            return f"{name} is {tensor.dtype} {list(tensor.shape)}; it must be float32 or float64 {list(shape)}"
    return None


C = TypeVar("C", bound=AdapterConfig)


class Method(ABC, Generic[C]):
    """The mathematics of one method with its options; without state, so that layers share it.

    Args:
        config: The options.

    Attributes:
        config_class: Of the options.
        update_class: Of the change that a file stores.
        layer_class: Of the converted layers; a subclass may add attributes, never machinery.
        doing: What the progress bar of a conversion says.
        derived: What a skeleton file has of each layer, for messages.
        trained: What is trained, for messages.
    """

    config_class: ClassVar[type[AdapterConfig]]
    update_class: ClassVar[type[Update]]
    layer_class: ClassVar[type[AdaptedLinear]] = AdaptedLinear
    doing: ClassVar[str] = "converting"
    derived: ClassVar[str] = "tensors"
    trained: ClassVar[str] = "the adapter"

    variants: ClassVar[Sequence[Mapping[str, Any]]] = ()
    """Options that choose other mathematics. The tests of all methods ask the same of each of them."""

    def __init__(self, config: C) -> None:
        self.config = config

    @classmethod
    def of(cls, config: C) -> Method[C]:
        """The method with these options."""
        return cls(config)

    # -- tensors ------------------------------------------------------------------------------------------------------

    @abstractmethod
    def specs(self, shape: Shape, rank: int) -> dict[str, Spec]:
        """Every tensor of a layer with W ``[out, in]`` of this shape, by name."""

    def rank_of(self, shape: Shape, rank: int) -> int:
        """The rank that a layer of this shape gets when `rank` is asked for."""
        return min(rank, *shape)

    def start(self, shape: Shape, rank: int, name: str) -> dict[str, Tensor]:
        """The trained tensors at first; float32, and the same on every process and machine. Default: zeros."""
        return {n: torch.zeros(spec.shape) for n, spec in self.specs(shape, rank).items() if spec.kind is Kind.TRAINED}

    def derive(self, weight: Tensor | None, rank: int, name: str, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Frozen and index tensors.

        Args:
            weight: W ``[out, in]``, whole; None where it is not at hand (meta device).
            rank: Of `rank_of`.
            name: Module name, for seeds and errors.
            given: Those of them that are known already, such as the indices in an adapter file.

        Raises:
            ValueError: W does not allow this rank.
        """
        return dict(given)

    def given_by(self, update: Update, shape: Shape) -> dict[str, Tensor]:
        """Those frozen and index tensors that an update of W ``[out, in]`` of this shape holds, under their own names."""
        specs = self.specs(shape, update.rank)
        return {n: t for n, t in update.tensors().items() if n in specs and specs[n].kind is not Kind.TRAINED}

    def read_given(self) -> Given | None:
        """What a file named in the options says of the layers; None where none is named."""
        return None

    def why_underived(self, given: Given | None, name: str) -> str | None:
        """Why a layer without its weight cannot be converted with what is given, behind its name."""
        return None

    @abstractmethod
    def values(self, tensors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
        """The floating-point tensors of the `Update` from trained and frozen ones: new tensors, differentiable."""

    @abstractmethod
    def numbers(self, update: Any, frozen: Mapping[str, Tensor], scale: float, name: str) -> dict[str, Tensor]:
        """The inverse of `values`: trained tensors, float32 or float64, that mean this update within rounding.

        Raises:
            ValueError: None do.
        """

    def fitted(self, weight: Tensor, update: Any, rank: int, scale: float, name: str) -> dict[str, Tensor]:
        """Every tensor of a layer of this rank, which may be larger than the update's, such that it means the update.

        Trained tensors may keep the shapes of the update's own rank, where they cannot be filled up.

        Args:
            weight: The pristine W ``[out, in]``.
            update: Of it.
            rank: Of the layer, at least `Update.width`.
            scale: Of the layer.
            name: Module name for errors.
        """
        raise NotImplementedError

    def update_of(self, tensors: Mapping[str, Tensor], scale: float) -> Update:
        """What trained, frozen and index tensors mean together."""
        indices = {f.name: tensors[f.name] for f in fields(self.update_class) if f.name in tensors}
        return self.update_class(**indices | self.values(tensors, scale))

    def make_adapter(
        self,
        start: Mapping[str, Tensor],
        frozen: Mapping[str, Tensor],
        device: torch.device,
        indices: Mapping[str, Tensor],
    ) -> Adapter:
        """The module that owns a layer's tensors."""
        return Adapter(self.values, start, frozen, device)

    def for_several(self) -> C:
        """The options for several adapters on one base, whose tensors take each other's place."""
        return self.config

    # -- the layer ----------------------------------------------------------------------------------------------------

    def refuse(self, layer: nn.Module, name: str) -> None:
        """Refuse a layer that the method or its options cannot serve, before any work.

        Raises:
            ValueError: Names the layer and what to type instead.
        """

    def why_untrainable(
        self, weight: Tensor, tensors: Mapping[str, Tensor], scale: float, dtype: torch.dtype
    ) -> str | None:
        """Why updates of this weight leave the range of a dtype, to be put behind the layer's name; None if they do not."""
        return None

    def looks_merged(self, base: Tensor, loaded: Tensor, indices: Mapping[str, Tensor]) -> bool:
        """Whether a weight ``[out, in]`` is another one with an update merged into it; False where nobody can tell."""
        return False

    def why_no_matrix(self) -> str | None:
        """Why an optimizer of matrices (Muon) cannot train the tensors, behind the layer's name, with the remedy."""
        return None

    def describe(self, layer: Any) -> str:
        """For the layer's ``repr``."""
        return f"{self.config.method}(rank={layer.rank})"

    def prepare(self, layer: Any) -> None:
        """Set the attributes of the layer that the method's forward reads; called once, when a layer is converted."""

    def forward(self, layer: Any, x: Tensor) -> Tensor:
        """``W' x + b``. The default forms W'; a method that can do without it should."""
        weight = layer.base_weight()
        changed = weight + layer.update().delta(weight)
        return F.linear(x, changed.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))

    # -- fused experts ------------------------------------------------------------------------------------------------

    def stacked_values(self, tensors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
        """`values` of tensors ``[experts, ...]``. Default: `values` itself, which allows dimensions in front."""
        return self.values(tensors, scale)

    def why_no_experts(self) -> str | None:
        """Why these options cannot serve fused experts, behind the parameter's name, with what to type; None if they can."""
        return None

    def why_no_matrix_parameter(self) -> str | None:
        """Why these options cannot serve a parameter of which only W' is formed, with what to type; None if they can.

        Dropout acts on the input of a product, which nobody knows.
        """
        share = self.config.input_dropout
        return f"has no input that dropout={share} could act on; type dropout=0" if share else None

    def grouped(self, layer: GroupedLayer, x: Tensor) -> Tensor:
        """``W'_e x`` of all experts of a parameter: x ``[pairs, in]``, sorted by expert, to ``[pairs, out]``; no bias.

        The default adds the product of the update's thin factors, where it has such, else of the change itself, which is
        formed for all experts at once. A method that has a cheaper product should say it.
        """
        y = layer.base(x)
        return y + layer.change(x.to(y.dtype), layer.values(), self.update_class).to(y.dtype)

    # -- convolutions and embeddings ----------------------------------------------------------------------------------

    def why_not_applied(self, layer: nn.Module) -> str | None:
        """Why these options cannot serve a convolution or an embedding, behind its name with the remedy; None if they can."""
        return None

    def applied(self, layer: AppliedLayer, x: Tensor) -> Tensor:
        """``W' x`` of patches or ids, without a bias. Default: by thin factors, where the update has such, else by W'."""
        return layer.changed(x, layer.values(), self.update_class)

    # -- figures ------------------------------------------------------------------------------------------------------

    def kept_per_token(self, shape: Shape, rank: int) -> int:
        """Numbers that a layer keeps for the backward pass per token, beside what the base keeps."""
        return shape[1]

    def figures(self, weight: Tensor | None, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Any]:
        """Fields of the report's `LayerReport` that the method knows more of."""
        return {}


def file_bytes(method: Method[Any], shape: Shape, rank: int, dtype: torch.dtype) -> int:
    """Bytes of a layer's tensors in the adapter file: numbers in the dtype of what is trained, indices in int32."""
    meta = torch.device("meta")
    tensors = {
        name: torch.empty(spec.shape, dtype=torch.int64 if spec.kind is Kind.INDEX else dtype, device=meta)
        for name, spec in method.specs(shape, rank).items()
    }
    stored = method.update_of(tensors, 1.0).tensors().values()
    return sum(t.numel() * (t.element_size() if t.is_floating_point() else 4) for t in stored)
