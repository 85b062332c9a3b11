"""Report of a selection from files, as data and as a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class SelectedLayer:
    """One matrix.

    Attributes:
        name: Canonical module name.
        shape: ``(out, in)`` of W.
        rank: Rank after clipping: of PMSS the number of selected columns and rows.
        requested_rank: The rank before clipping.
        residual: ``||W - C C^+ W||_F / ||W||_F`` of selected columns; None where nothing is selected.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    requested_rank: int
    residual: float | None


@dataclass(frozen=True)
class SelectReport:
    """Report of `select_files`; ``print`` it for a table.

    Attributes:
        output: The skeleton file.
        architecture: Model class.
        selection: The method's options in words.
        layers: One entry per matrix, in the order of the base's files.
        left_out: Linear layers that were left out, with the reason.
        resumed: Number of matrices that an earlier, interrupted run had finished.
        workers: Number of matrices at a time.
        seconds: Total wall time.
        selecting_seconds: Wall time of the selection alone.
        bytes: Size of the file.
        peak_memory: Largest resident memory of the process so far in bytes, libraries included; None where unknown.
    """

    output: str
    architecture: str
    selection: str
    layers: list[SelectedLayer]
    left_out: dict[str, str]
    resumed: int
    workers: int
    seconds: float
    selecting_seconds: float
    bytes: int
    peak_memory: int | None

    @property
    def selected(self) -> int:
        """Number of matrices that this run selected from."""
        return len(self.layers) - self.resumed

    @property
    def matrices_per_second(self) -> float:
        """Speed of this run's selection; 0 if it selected nothing."""
        return self.selected / self.selecting_seconds if self.selected else 0.0

    @property
    def mean_residual(self) -> float | None:
        """Mean of the layers' residuals; None without any."""
        known = [layer.residual for layer in self.layers if layer.residual is not None]
        return sum(known) / len(known) if known else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        sums = {name: getattr(self, name) for name in ("selected", "matrices_per_second", "mean_residual")}
        return asdict(self) | sums

    def __str__(self) -> str:
        kinds: dict[tuple[Any, ...], list[SelectedLayer]] = {}
        for layer in self.layers:
            kind = ".".join("*" if part.isdigit() else part for part in layer.name.split("."))
            kinds.setdefault((kind, layer.shape, layer.rank, layer.requested_rank), []).append(layer)
        table = [("module", "count", "out x in", "rank", "residual")]
        for (kind, shape, rank, asked), group in kinds.items():
            values = [layer.residual for layer in group if layer.residual is not None]
            residual = f"{min(values):.3f}" if values else "-"
            residual += f"-{max(values):.3f}" if len(values) > 1 else ""
            clipped = str(rank) if rank == asked else f"{rank} (asked {asked})"
            table.append((kind, str(len(group)), f"{shape[0]} x {shape[1]}", clipped, residual))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
        ]
        lines.insert(1, "-" * max(map(len, lines)))
        for why in dict.fromkeys(self.left_out.values()):
            names = [name for name, reason in self.left_out.items() if reason == why]
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            lines.append(f"left out ({why}): {', '.join(names[:4])}{more}")
        kept = f", {self.resumed} of them by an earlier run" if self.resumed else ""
        memory = "" if self.peak_memory is None else f"; peak memory {self.peak_memory / 2**20:.0f} MiB"
        lines.append(f"{len(self.layers)} matrices of {self.architecture}{kept} ({self.selection})")
        mean = "" if self.mean_residual is None else f"; mean residual {self.mean_residual:.3f}"
        lines.append(
            f"{self.seconds:.1f} s, {self.matrices_per_second:.2f} matrices per second with {self.workers} worker"
            f"{'s' if self.workers > 1 else ''}{mean}{memory}"
        )
        lines.append(f"written: {self.output} ({self.bytes / 2**20:.2f} MiB)")
        return "\n".join(lines)
