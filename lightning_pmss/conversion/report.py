"""What a conversion did, as data and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_pmss.conversion.left_out import HEAD
from lightning_pmss.messages import kind_of
from lightning_pmss.methods.config import AdapterConfig

UNOWNED_LIMIT = 0.1  # share of the model in weights that cannot be converted, above which a user is warned


@dataclass
class LayerReport:
    """One converted layer.

    Attributes:
        name: Canonical module name.
        shape: ``(out, in)`` of W.
        rank: After clipping.
        requested_rank: The rank asked for.
        trainable: Numbers that are trained.
        kept_bytes_per_token: Bytes that the adapter keeps for the backward pass per token, in the base's dtype.
        file_bytes: Bytes of the layer's tensors in the adapter file.
        edit: Of PMSS: which product of the layer carries the update.
        residual: Of PMSS: ``||W - C C^+ W||_F / ||W||_F``; None where W was not at hand.
        rounding_error: Share of an update that is lost where the layer computes in bfloat16 (float16 on such a base), see
            `lightning_pmss.methods.pmss.rounding`.
        fitting_rank: A rank at which little is lost, where that is too much at this one; else None.
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
    """What `convert` did; ``print`` it for a table.

    Attributes:
        config: The configuration used.
        layers: One entry per converted layer, in model order.
        left_out: Linear layers that were not converted, and frozen parameters of two and more dimensions of other modules,
            with the reason.
        shares: Of the model's parameters, by name in `left_out`.
        unowned: Names in `left_out` of parameters that no option could have had converted.
        asleep: The topmost modules left out because they were frozen and in eval mode beside others that were not.
        children: Number of converted layers by top-level child of the model.
        fresh: Tensors that no file of the base holds, by name, with the number of their rows that the files do hold
            (`lightning_pmss.files.fresh`); None where nobody has looked.
        also_train: Names of the modules trained in full.
        trainable: Parameters that train: all U and ``also_train``.
        total: All parameters of the model (without the frozen coordinate factors).
        also_train_bytes: Bytes of ``also_train`` in the adapter file.
        notes: Anything else a user should know.
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
        """Bytes of the adapter's tensors (the file adds a header of about 300 bytes per layer)."""
        return sum(layer.file_bytes for layer in self.layers) + self.also_train_bytes

    @property
    def kept_bytes_per_token(self) -> int:
        """Bytes kept for the adapters' backward pass per token."""
        return sum(layer.kept_bytes_per_token for layer in self.layers)

    def rounding_warning(self, dtype: str) -> str | None:
        """What a user should know where layers compute in a low precision; None where there is nothing to say."""
        lossy = sorted((layer for layer in self.layers if layer.fitting_rank), key=lambda layer: -layer.rounding_error)
        if not lossy:
            return None
        worst, pattern = lossy[0], ", ".join(f"{layer.name!r}: {layer.fitting_rank}" for layer in lossy[:3])
        more = f" and so on for {len(lossy) - 3} more" if len(lossy) > 3 else ""
        return (
            f"In {dtype} rounding would take {min(1.0, worst.rounding_error):.0%} of the update of `{worst.name}` (rank"
            f" {worst.rank} of {min(worst.shape)} possible), and more than a tenth in {len(lossy)} of {len(self.layers)}"
            f" layers: their rows or columns are nearly dependent. Type rank_pattern={{{pattern}}}{more}, or"
            " coordinates='spectral', or compute in float32."
        )

    def unowned_warning(self) -> str | None:
        """What a user should know where much of the model is in weights that cannot be converted; None where it is little."""
        total = sum(self.shares.get(name, 0.0) for name in self.unowned)
        if total <= UNOWNED_LIMIT:
            return None
        groups = {kind: (names, sum(self.shares[n] for n in names)) for kind, names in _bykind_of(self.unowned).items()}
        biggest = sorted(groups.items(), key=lambda item: -item[1][1])[:3]
        listed = "; ".join(
            f"`{kind if len(names) > 1 else names[0]}` ({self.left_out[names[0]]}, {share:.1%} of the model)"
            for kind, (names, share) in biggest
        )
        return (
            f"{total:.0%} of the model's parameters belong to no linear layer, so they are not converted and stay frozen. The"
            f" biggest: {listed}. To train such weights in full, name their module in also_train."
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        sums = {name: getattr(self, name) for name in ("share", "adapter_bytes", "kept_bytes_per_token")}
        return asdict(self) | {"config": self.config.to_dict()} | sums

    def __str__(self) -> str:
        """The table, with layers of equal kind folded into one line (a 32-layer model has 7 kinds)."""
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


def _bykind_of(names: Sequence[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(kind_of(name), []).append(name)
    return groups


def _kinds(names: Sequence[str]) -> list[str]:
    """Names, those of equal kind as one with their number."""
    return [group[0] if len(group) == 1 else f"{kind} ({len(group)})" for kind, group in _bykind_of(names).items()]


def _few(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
