"""Report of a conversion, as data and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_pmss.conversion.left_out import HEAD, NAMEABLE, UNNAMED
from lightning_pmss.messages import kind_of
from lightning_pmss.methods.config import AdapterConfig

UNOWNED_LIMIT = 0.1  # share of the model, 0 to 1, in weights that cannot be converted; above it a warning is given


@dataclass
class LayerReport:
    """One converted layer.

    Attributes:
        name: Canonical module name.
        shape: ``(out, in)`` of W.
        rank: Rank after clipping.
        requested_rank: The rank asked for.
        trainable: Number of trained parameters.
        kept_bytes_per_token: Bytes that the adapter keeps for the backward pass per token, in the base's dtype.
        file_bytes: Bytes of the layer's tensors in the adapter file.
        edit: PMSS only: the form in which the update is computed, such as ``"input"``.
        residual: PMSS only: ``||W - C C^+ W||_F / ||W||_F``; None where W was not available.
        rounding_error: Share of an update that is lost if the layer computes in bfloat16 (float16 on such a base), see
            `lightning_pmss.methods.pmss.rounding`.
        fitting_rank: A lower rank that loses little, where this rank loses too much; else None.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    requested_rank: int
    trainable: int
    kept_bytes_per_token: int
    file_bytes: int
    edit: str = ""
    residual: float | None = None
    rounding_error: float = 0.0
    fitting_rank: int | None = None


@dataclass
class ConversionReport:
    """Report of `convert`; ``print`` shows it as a table.

    Attributes:
        config: The configuration used.
        layers: One entry per converted layer, in model order.
        left_out: Reason by name of linear layers that were not converted, and of other modules' frozen parameters of two and
            more dimensions.
        shares: Share of the model's parameters, 0 to 1, by name in `left_out`.
        unowned: Names in `left_out` of parameters that no option converts.
        asleep: Names of the topmost modules left out because they were frozen and in eval mode while others were not.
        children: Number of converted layers by top-level child of the model.
        fresh: Number of rows in the base's files by name of each tensor that these files lack, wholly or in part
            (`lightning_pmss.files.fresh`); None before that check.
        also_train: Names of the modules trained in full.
        trainable: Number of trained parameters, of adapters and ``also_train``.
        total: Number of all parameters of the model, without frozen tensors that a method derived.
        also_train_bytes: Bytes of ``also_train`` in the adapter file.
        notes: Further lines for the table.
    """

    config: AdapterConfig
    layers: list[LayerReport]
    left_out: dict[str, str]
    also_train: list[str]
    trainable: int
    total: int
    also_train_bytes: int
    notes: list[str] = field(default_factory=list)
    shares: dict[str, float] = field(default_factory=dict)
    unowned: list[str] = field(default_factory=list)
    asleep: list[str] = field(default_factory=list)
    children: dict[str, int] = field(default_factory=dict)
    fresh: dict[str, int] | None = field(default=None, compare=False)

    @property
    def share(self) -> float:
        """Trainable share of all parameters, 0 to 1."""
        return self.trainable / self.total

    @property
    def adapter_bytes(self) -> int:
        """Bytes of the adapter's tensors; the file adds a header of about 300 bytes per layer."""
        return sum(layer.file_bytes for layer in self.layers) + self.also_train_bytes

    @property
    def kept_bytes_per_token(self) -> int:
        """Bytes kept for the adapters' backward pass per token."""
        return sum(layer.kept_bytes_per_token for layer in self.layers)

    def rounding_warning(self, dtype: str) -> str | None:
        """Warning where a low-precision dtype would destroy much of an update; None if no layer is affected."""
        lossy = sorted((layer for layer in self.layers if layer.fitting_rank), key=lambda layer: -layer.rounding_error)
        if not lossy:
            return None
        worst, pattern = lossy[0], ", ".join(f"{layer.name!r}: {layer.fitting_rank}" for layer in lossy[:3])
        more = f" and so on for {len(lossy) - 3} more" if len(lossy) > 3 else ""
        return (
            f"In {dtype} rounding would destroy {min(1.0, worst.rounding_error):.0%} of the update of `{worst.name}` (rank"
            f" {worst.rank} of {min(worst.shape)} possible), and more than a tenth in {len(lossy)} of {len(self.layers)}"
            f" layers: their rows or columns are nearly dependent. Type rank_pattern={{{pattern}}}{more}, or"
            " coordinates='spectral', or compute in float32."
        )

    def unowned_warning(self) -> str | None:
        """Warning where more than `UNOWNED_LIMIT` of the model cannot be converted; None otherwise."""
        total = sum(self.shares.get(name, 0.0) for name in self.unowned)
        if total <= UNOWNED_LIMIT:
            return None
        groups = {kind: (names, sum(self.shares[n] for n in names)) for kind, names in _by_kind(self.unowned).items()}
        biggest = sorted(groups.items(), key=lambda item: -item[1][1])[:3]
        listed = "; ".join(
            f"`{kind if len(names) > 1 else names[0]}` ({self.left_out[names[0]]}, {share:.1%} of the model)"
            for kind, (names, share) in biggest
        )
        fused = sorted({name.rpartition(".")[2] for name in self.unowned if self.left_out[name] == UNNAMED})
        experts = f" To convert the experts, type target_parameters={fused}." if fused else ""
        named = any(self.left_out[name] in NAMEABLE for name in self.unowned)
        others = " To convert convolutions and embeddings, name them in target_modules." if named else ""
        return (
            f"{total:.0%} of the model's parameters belong to no linear layer, so they are not converted and stay frozen. The"
            f" biggest: {listed}. To train such weights in full, name their module in also_train.{experts}{others}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        sums = {name: getattr(self, name) for name in ("share", "adapter_bytes", "kept_bytes_per_token")}
        return asdict(self) | {"config": self.config.to_dict()} | sums

    def __str__(self) -> str:
        """Table with one line per kind of layer (a 32-layer model has 7 kinds)."""
        kinds: dict[tuple[Any, ...], list[LayerReport]] = {}
        for layer in self.layers:
            kinds.setdefault((kind_of(layer.name), layer.shape, layer.rank, layer.edit), []).append(layer)
        rows = [("module", "count", "out x in", "rank", "edit", "trainable", "residual")]
        for (kind, shape, rank, edit), group in kinds.items():
            clipped = f"{rank} (asked {group[0].requested_rank})" if group[0].requested_rank != rank else str(rank)
            known = [layer.residual for layer in group if layer.residual is not None]
            residual = "" if not known else f"{min(known):.3f}" + (f"-{max(known):.3f}" if len(known) > 1 else "")
            trainable = f"{sum(layer.trainable for layer in group):,}"
            rows.append((kind, str(len(group)), f"{shape[0]} x {shape[1]}", clipped, edit, trainable, residual))
        used = [
            i for i, name in enumerate(rows[0]) if name not in ("edit", "residual") or any(row[i] for row in rows[1:])
        ]
        rows = [tuple(row[i] for i in used) for row in rows]  # type: ignore[misc]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "-" * max(map(len, lines)))
        lines.append(
            f"{len(self.layers)} layers converted; trainable {self.trainable:,} of {self.total:,} ({self.share:.3%});"
            f" adapter {self.adapter_bytes / 2**20:.2f} MiB; kept for backward {self.kept_bytes_per_token / 1024:.1f} KiB"
            " per token"
        )
        if self.children:
            lines.append(f"converted in: {_few([f'{name} ({count})' for name, count in self.children.items()])}")
        reasons: dict[str, list[str]] = {}
        for name, why in self.left_out.items():
            reasons.setdefault(why, []).append(name)
        for why, names in reasons.items():
            share = sum(self.shares.get(name, 0.0) for name in names)
            lines.append(f"left out ({why}): {_few(_kinds(names))}; {share:.1%} of the model")
        if frozen := reasons.get(HEAD, []):
            names = [repr(name) for name in frozen]
            lines.append(f"frozen as it is: {_few(frozen)}; if freshly initialised, type also_train=[{_few(names)}]")
        if self.also_train:
            lines.append(f"trained in full: {', '.join(self.also_train)}")
        return "\n".join([*lines, *self.notes])


def _by_kind(names: Sequence[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(kind_of(name), []).append(name)
    return groups


def _kinds(names: Sequence[str]) -> list[str]:
    """Names, with those of equal kind merged into one and their number."""
    return [group[0] if len(group) == 1 else f"{kind} ({len(group)})" for kind, group in _by_kind(names).items()]


def _few(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
