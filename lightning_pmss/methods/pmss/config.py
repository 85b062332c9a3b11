"""What the user chooses: `PMSSConfig`, checked when it is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import cache
from typing import Any, get_type_hints

import torch
from pydantic import Field, create_model

from lightning_pmss.messages import some
from lightning_pmss.methods.pmss.layer import COORDINATES, EDITS, MEMORY_MODES
from lightning_pmss.methods.pmss.selection import ROW_MODES, SELECTORS
from lightning_pmss.store import Record, checked

_NUMBERS = torch.finfo(torch.float32)
# The rank at which scale="auto" is 1. Adam moves each entry of V by the learning rate, so the update grows with the rank.
REFERENCE_RANK = 64


@dataclass(frozen=True)
class PMSSConfig:
    """How a model is converted. Every field can be given to `PMSSCallback` and on the command line as ``--pmss.<field>``.

    Args:
        target_modules: ``"all-linear"`` (every linear layer of the body; output head and embeddings are left out); a module's
            name, where ``t`` matches a module called ``t`` or ending in ``"." + t``, or a list of names; or any other string:
            a regular expression for the full name. Each item must match something.
        exclude_modules: Modules left out of the targets, with everything below them; name, list or regular expression as above.
        rank: Rows and columns selected per layer; clipped to the smaller side of a layer, which the report says.
        rank_pattern: Rank of the targets that match a key (a name ending or a regular expression); the first match counts.
        selection: Rule that selects columns and rows: ``lupp``, ``pivoted_qr``, ``leverage``, ``norm``, ``random`` or
            ``inverse_norm``.
        row_mode: ``"independent"`` selects rows from W, ``"nested"`` from the selected columns.
        oversample: Extra rows of the sketch of ``lupp``, beside a quarter to a half of the rank.
        seed: Seed of the selection; independent of the global random state.
        scale: Factor s of the update ``s C U R``: a number, or ``"auto"`` for 64 / rank of each layer, with which one learning
            rate serves all ranks (docs/evidence.md), as LoRA's alpha / r is meant to.
        coordinates: Coordinates of the trained tensor: ``"orthonormal"``, ``"spectral"`` or ``"raw"``; or ``"rotation"``: half
            as many numbers, which rotate the block of W between its selected columns and rows
            (`lightning_pmss.methods.pmss.rotation`).
        dropout: Dropout probability on ``h = R x``.
        edit: Which side of the layer carries the update: ``"input"``, ``"output"`` or ``"auto"`` (by shape); or ``"weight"``:
            form W' in every pass, for float32 weights and micro-batches of many tokens (docs/performance.md).
        also_train: Modules trained in full and saved with the adapter, such as a fresh classification head; patterns
            like ``target_modules``'.
        skeleton_file: A safetensors file with ``<module>.rows`` and ``<module>.cols`` (an adapter file has them) to use
            instead of selecting.
        memory: ``"regather"`` gathers each layer's slice of W again in the backward pass; ``"keep"`` keeps it from the forward
            pass: up to a few hundredths faster, at two to four times the bytes (docs/performance.md).
        root: Full name of the module to adapt, in a model that holds several (``"policy"``): only what lies inside is
            converted, names are relative to it, and adapter, merged model and export are for it alone. ``also_train`` may
            name modules beside it.

    Raises:
        ValueError: A value is out of its range; the message names the field and the values allowed.
    """

    target_modules: str | Sequence[str] = "all-linear"
    exclude_modules: str | Sequence[str] = ()
    rank: int = 256
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    selection: str = "lupp"
    row_mode: str = "independent"
    oversample: int = 10
    seed: int = 0
    scale: float | str = "auto"
    coordinates: str = "orthonormal"
    dropout: float = 0.0
    edit: str = "auto"
    also_train: str | Sequence[str] = ()
    skeleton_file: str | None = None
    memory: str = "regather"
    root: str | None = None

    def __post_init__(self) -> None:
        # Lists, so that equality and JSON do not depend on which sequence type a caller happened to use.
        for name in ("target_modules", "exclude_modules", "also_train"):
            value = getattr(self, name)
            if not isinstance(value, str):
                object.__setattr__(self, name, list(value or ()))
        object.__setattr__(self, "rank_pattern", dict(self.rank_pattern))
        if self.skeleton_file is not None:
            object.__setattr__(self, "skeleton_file", str(self.skeleton_file))
        if not self.target_modules:
            raise ValueError("target_modules is empty; type 'all-linear' or a list of module names such as ['q_proj'].")
        for where, rank in (("rank", self.rank), *((f"rank_pattern[{k!r}]", v) for k, v in self.rank_pattern.items())):
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise ValueError(f"{where}={rank!r} is not a rank; type a whole number of at least 1.")
        for name, allowed in (
            ("selection", tuple(SELECTORS)),
            ("row_mode", ROW_MODES),
            ("coordinates", COORDINATES),
            ("edit", EDITS),
            ("memory", MEMORY_MODES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not known; choose one of {list(allowed)}.")
        if isinstance(self.oversample, bool) or not isinstance(self.oversample, int) or self.oversample < 0:
            raise ValueError(f"oversample={self.oversample!r} must be a whole number of at least 0.")
        if isinstance(self.scale, (str, bool)) and self.scale != "auto":
            raise ValueError(f"scale={self.scale!r} is not known; type 'auto' or a number.")
        if not isinstance(self.scale, str) and not _NUMBERS.tiny <= abs(self.scale) <= _NUMBERS.max:
            raise ValueError(
                f"scale={self.scale!r} must be finite and not zero, else U can never change the layer; its size is held in"
                f" float32, from {_NUMBERS.tiny:.3g} to {_NUMBERS.max:.3g}."
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r} must lie in [0, 1).")

    def scale_of(self, rank: int) -> float:
        """The factor s of a layer with ``rank`` rows and columns."""
        return REFERENCE_RANK / rank if isinstance(self.scale, str) else float(self.scale)

    @classmethod
    def from_file(cls, values: Any, where: str, remedy: str) -> PMSSConfig:
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
        if isinstance(values, Mapping) and (unknown := [name for name in values if name not in known]):
            raise ValueError(f"{where}: its PMSS options do not fit this version: {some(unknown)} unknown. {remedy}")
        options = checked(_record_of(options_class), values, where, remedy, under="config")
        try:
            return cls(**options.model_dump(exclude_unset=True))
        except ValueError as error:
            raise ValueError(f"{where}: its PMSS options do not fit this version: {error} {remedy}") from error

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON and for a checkpoint that is loaded with ``weights_only=True``."""
        return asdict(self)


@cache
def _record_of(options: Any) -> type[Record]:
    """What the dataclass's fields look like in a file."""
    types, known = get_type_hints(options), {}
    for option in fields(options):
        made: Any = option.default_factory
        known[option.name] = (types[option.name], option.default if made is MISSING else Field(default_factory=made))
    record: type[Record] = create_model(options.__name__, __base__=Record, **known)  # type: ignore[call-overload]
    return record
