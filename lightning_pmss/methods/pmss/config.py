"""What the user chooses for PMSS: `PMSSConfig`, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lightning_pmss.methods.choices import one_of
from lightning_pmss.methods.config import AdapterConfig
from lightning_pmss.methods.documentation import inherit_options

SELECTIONS = ("lupp", "pivoted_qr", "leverage", "norm", "random", "inverse_norm")
ROW_MODES = ("independent", "nested")
COORDINATES = ("orthonormal", "rotation", "spectral", "raw")
COLUMNS = ("selected", "all")
EDITS = ("auto", "input", "output", "weight")
MEMORY_MODES = ("keep", "regather")
# The rank at which scale="auto" is 1. Adam moves each entry of V by the learning rate, so the update grows with the rank.
REFERENCE_RANK = 64
# A one-sided V [out, r] is like a square one of rank sqrt(out r). Its factor is ten times as large, so that clipping at norm 1
# gives all steps one size (docs/evidence.md).
ALL_COLUMNS = 640


@inherit_options(AdapterConfig)
@dataclass(frozen=True)
class PMSSConfig(AdapterConfig):
    """Options of PMSS. Every field can be given to `PMSSCallback` and on the command line as ``--pmss.<field>``.

    Args:
        columns: ``"selected"``: the paper's square core between selected columns and rows. ``"all"``: select rows only and
            train one number per output and row (`lightning_pmss.methods.pmss.one_sided`): type a low rank then, 8 to 64.
        rank: Rows and columns selected per layer; clipped to the smaller side of a layer, which the report says.
        selection: Rule that selects columns and rows: ``lupp``, ``pivoted_qr``, ``leverage``, ``norm``, ``random`` or
            ``inverse_norm``.
        row_mode: ``"independent"`` selects rows from W, ``"nested"`` from the selected columns.
        oversample: Extra rows of the sketch of ``lupp``, beside a quarter to a half of the rank.
        seed: Seed of the selection; independent of the global random state.
        scale: Factor s of the update ``s C U R``: a number, or ``"auto"`` for 64 / rank of each layer, with which one learning
            rate serves all ranks (docs/evidence.md), as LoRA's alpha / r is meant to; with all columns 640 / sqrt(out rank).
        coordinates: Coordinates of the trained tensor: ``"orthonormal"``, ``"spectral"`` or ``"raw"``; or ``"rotation"``: half
            as many numbers, which rotate the block of W between its selected columns and rows
            (`lightning_pmss.methods.pmss.rotation`).
        dropout: Dropout probability on ``h = R x``.
        edit: Which side of the layer carries the update: ``"input"``, ``"output"`` or ``"auto"`` (by shape); or ``"weight"``:
            form W' in every pass, for float32 weights and micro-batches of many tokens (docs/performance.md).
        skeleton_file: A safetensors file with ``<module>.rows`` and ``<module>.cols`` (an adapter file has them) to use
            instead of selecting.
        memory: ``"regather"`` gathers each layer's slice of W again in the backward pass; ``"keep"`` keeps it from the forward
            pass: up to a few hundredths faster, at two to four times the bytes (docs/performance.md).

    Raises:
        ValueError: A value is out of its range; the message names the field and the values allowed.
    """

    method = "pmss"
    per_matrix = ("rank", "columns", "selection", "row_mode", "oversample", "seed", "coordinates")
    columns: str = field(default="selected", metadata=one_of(*COLUMNS))
    rank: int = 256
    selection: str = field(default="lupp", metadata=one_of(*SELECTIONS))
    row_mode: str = field(default="independent", metadata=one_of(*ROW_MODES))
    oversample: int = 10
    seed: int = 0
    scale: float | str = "auto"
    coordinates: str = field(default="orthonormal", metadata=one_of(*COORDINATES))
    dropout: float = 0.0
    edit: str = field(default="auto", metadata=one_of(*EDITS))
    skeleton_file: str | None = None
    memory: str = field(default="regather", metadata=one_of(*MEMORY_MODES))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.skeleton_file is not None:
            object.__setattr__(self, "skeleton_file", str(self.skeleton_file))
        if isinstance(self.oversample, bool) or not isinstance(self.oversample, int) or self.oversample < 0:
            raise ValueError(f"oversample={self.oversample!r} must be a whole number of at least 0.")
        if self.columns == "all":
            for name, only in (("row_mode", "independent"), ("edit", "auto"), ("memory", "regather")):
                if getattr(self, name) != only:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} is for columns='selected'; with columns='all' leave it out."
                    )
            if self.coordinates == "rotation":
                raise ValueError(
                    "coordinates='rotation' rotates selected columns; with columns='all' type 'orthonormal'."
                )
        if isinstance(self.scale, (str, bool)) and self.scale != "auto":
            raise ValueError(f"scale={self.scale!r} is not known; type 'auto' or a number.")
        if not isinstance(self.scale, str):
            self.check_factor("scale", self.scale)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r} must lie in [0, 1).")

    def scale_of(self, rank: int, shape: tuple[int, int]) -> float:
        """The factor s of a layer with ``rank`` rows and columns, or with all columns of so many rows."""
        if not isinstance(self.scale, str):
            return float(self.scale)
        return ALL_COLUMNS / (shape[0] * rank) ** 0.5 if self.columns == "all" else REFERENCE_RANK / rank

    def card(self) -> str:
        """The update, and what it is bound to."""
        if self.columns == "all":
            update = "`W' = W + U R`: R is rows of the base's own weights, stored as indices; U was trained (PMSS, one-sided,"
        else:
            update = (
                "`W' = W + C (s U) R`: C and R are columns and rows of the base's own weights, stored as indices; U was"
            )
            update += " trained (PMSS,"
        bound = "It means nothing on other weights, and loading on them is refused."
        return f"{update} arXiv 2409.16722, with lightning-pmss). {bound}"

    def summary(self) -> str:
        """Columns, selection, coordinates, scale."""
        sides = "all columns, " if self.columns == "all" else ""
        return f"{sides}selection {self.selection}, {self.coordinates} coordinates, scale {self.scale}"

    @property
    def input_dropout(self) -> float:
        """See `AdapterConfig`."""
        return self.dropout

    def meaning(self) -> dict[str, Any]:
        """Columns, coordinates and scale say what V is."""
        return {"columns": self.columns, "coordinates": self.coordinates, "scale": self.scale}
