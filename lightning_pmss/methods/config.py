"""What the user chooses for every method: `AdapterConfig`, checked when it is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import cache
from typing import Any, ClassVar, Self, get_type_hints

from pydantic import Field, create_model

from lightning_pmss.messages import some
from lightning_pmss.methods.choices import check_choices
from lightning_pmss.store import Record, checked

# Of float32, by its definition (IEEE 754): torch takes seconds to import, and a command's help needs these classes.
_OF_ALL = ("target_modules", "exclude_modules", "target_parameters", "rank_pattern")
_TINY, _LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127


@dataclass(frozen=True)
class AdapterConfig:
    """Which layers are converted, and at which rank. Each method adds options of its own.

    Args:
        target_modules: ``"all-linear"`` (every linear layer of the body and every matrix of fused experts; output head,
            embeddings and convolutions are left out, and the latter two converted where they are named); a module's name,
            where ``t`` matches a module called ``t`` or ending in ``"." + t``, or a list of names; or any other string: a
            regular expression for the full name. Each item must match something.
        exclude_modules: Modules left out of the targets, with everything below them; name, list or regular expression as above.
            A parameter of fused experts may be named too.
        rank: Rank of each layer's update; clipped to the smaller side of a layer, which the report says.
        rank_pattern: Rank of the targets that match a key (a name ending or a regular expression); the first match is used.
        also_train: Modules trained in full and saved with the adapter, such as a fresh classification head; patterns
            like ``target_modules``'.
        root: Full name of the module to adapt, in a model that holds several (``"policy"``): only what lies inside is
            converted, names are relative to it, and adapter, merged model and export are for it alone. ``also_train`` may
            name modules beside it.
        target_parameters: Parameters that are converted beside the modules: of fused experts (``"gate_up_proj"``), each expert
            for itself, or matrices of other modules (``"in_proj_weight"``); name, list or regular expression as for
            ``target_modules``. ``"all-linear"`` has all experts already. To convert these alone, type ``target_modules=[]``.

    Raises:
        ValueError: A value is out of its range; the message names the option and the values allowed.
    """

    method: ClassVar[str]
    """Name of the method in `lightning_pmss.METHODS`."""

    per_matrix: ClassVar[tuple[str, ...]] = ()
    """The options on which the tensors depend that the method derives from a W; empty where it derives none."""

    @classmethod
    def skeleton_options(cls) -> tuple[str, ...]:
        """The options on which a skeleton file depends: those of each matrix, and those that choose matrices and ranks."""
        return (*cls.per_matrix, *_OF_ALL) if cls.per_matrix else ()

    target_modules: str | Sequence[str] = "all-linear"
    exclude_modules: str | Sequence[str] = ()
    rank: int = 16
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    also_train: str | Sequence[str] = ()
    root: str | None = None
    target_parameters: str | Sequence[str] = ()

    def __post_init__(self) -> None:
        # Lists, so that equality and JSON do not depend on which sequence type a caller happened to use.
        for name in ("target_modules", "exclude_modules", "target_parameters", "also_train"):
            value = getattr(self, name)
            if not isinstance(value, str):
                object.__setattr__(self, name, list(value or ()))
        object.__setattr__(self, "rank_pattern", dict(self.rank_pattern or {}))
        if not self.target_modules and not self.target_parameters:
            raise ValueError("target_modules is empty; type 'all-linear' or a list of module names such as ['q_proj'].")
        for where, rank in (("rank", self.rank), *((f"rank_pattern[{k!r}]", v) for k, v in self.rank_pattern.items())):
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise ValueError(f"{where}={rank!r} is not a rank; type a whole number of at least 1.")
        check_choices(self)

    @staticmethod
    def check_factor(name: str, value: Any) -> None:
        """Refuse a factor of the update with which the trained numbers of an adapter leave the range of float32.

        Raises:
            ValueError: It is no number, zero, not finite, or too small.
        """
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{name}={value!r} is no number.")
        if not _TINY <= abs(value) <= _LARGEST:
            raise ValueError(
                f"{name}={value!r} must be finite and not zero, else the update can never change the layer; its size is held"
                f" in float32, from {_TINY:.3g} to {_LARGEST:.3g}."
            )

    @property
    def input_dropout(self) -> float:
        """Probability of dropout on the input of a product; 0 of methods that have none."""
        return 0.0

    def scale_of(self, rank: int, shape: tuple[int, int]) -> float:
        """The factor of the update of a layer with this rank and a W ``[out, in]`` of this shape."""
        return 1.0

    def meaning(self) -> dict[str, Any]:
        """The options without which trained tensors mean something else: a checkpoint with others is not loaded."""
        return {}

    def card(self) -> str:
        """Sentences for a model card: the update of this method, and its source."""
        raise NotImplementedError

    def summary(self) -> str:
        """The options that say most, in a few words."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON and for a checkpoint that is loaded with ``weights_only=True``."""
        return asdict(self)

    @classmethod
    def from_file(cls, values: Any, where: str, remedy: str) -> Self:
        """The options that a file holds; those that an older file lacks are the defaults.

        Args:
            values: As read: plain values, not checked yet.
            where: The file, for messages.
            remedy: What to do about a damaged one, a whole sentence.

        Raises:
            ValueError: An option is unknown, of another type or out of its range.
        """
        options_class: Any = cls
        known = {option.name for option in fields(cls)}
        does_not_fit = f"{where}: its {cls.label()} options do not fit this version"
        if isinstance(values, Mapping) and (unknown := [name for name in values if name not in known]):
            raise ValueError(f"{does_not_fit}: {some(unknown)} unknown. {remedy}")
        options = checked(_record_of(options_class), values, where, remedy, under="config")
        try:
            return cls(**options.model_dump(exclude_unset=True))
        except ValueError as error:
            raise ValueError(f"{does_not_fit}: {error} {remedy}") from error

    @classmethod
    def label(cls) -> str:
        """The method's name as people write it."""
        return cls.__name__.removesuffix("Config")


@dataclass(frozen=True)
class ScaledConfig(AdapterConfig):
    """Options of a method whose update has one factor for all layers.

    Args:
        scale: Factor s of the update.

    Raises:
        ValueError: See `AdapterConfig`.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_factor("scale", self.scale)

    def scale_of(self, rank: int, shape: tuple[int, int]) -> float:
        """s."""
        return self.scale

    def meaning(self) -> dict[str, Any]:
        """s scales what is trained."""
        return {"scale": self.scale}


@cache
def _record_of(options: Any) -> type[Record]:
    """What the dataclass's fields look like in a file."""
    types, known = get_type_hints(options), {}
    for option in fields(options):
        made: Any = option.default_factory
        known[option.name] = (types[option.name], option.default if made is MISSING else Field(default_factory=made))
    record: type[Record] = create_model(options.__name__, __base__=Record, **known)  # type: ignore[call-overload]
    return record
