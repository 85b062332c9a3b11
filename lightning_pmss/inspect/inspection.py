"""Measure the update of each layer, from an adapter folder and, if given, its base.

The update ``B A`` is never formed: with thin QR ``B = Q_B T_B`` and ``A^T = Q_A T_A`` its singular values are those of the
small matrix ``T_B T_A^T``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lightning_pmss.files.adapter_file import WEIGHTS_FILE, AdapterFile, AdapterModule, read_adapter
from lightning_pmss.files.lora_source import file_source, thin
from lightning_pmss.methods import method_of
from lightning_pmss.methods.method import Factors, Kind
from lightning_pmss.store.shards import open_shards

_BLOCK = 2**20  # elements of W cast to float32 at a time
_SHOWN = 3  # singular values in the table


@dataclass(frozen=True)
class InspectedLayer:
    """Figures of one layer; those that need the base are None without it.

    Attributes:
        name: Canonical module name.
        shape: (out, in) of W.
        rank: Largest possible rank of the update.
        u_norm: Frobenius norm of the stored numbers (PMSS: ``s U``, which depends on the norms of the base's rows and columns).
        update_norm: Frobenius norm of the update.
        relative_norm: ``update_norm`` divided by the Frobenius norm of W.
        singular_values: All ``rank`` singular values of the update, largest first.
        effective_rank: ``exp`` of the entropy of the normalised singular values (Roy and Vetterli, "The effective rank",
            2007): ``rank`` if all are equal, 1 if only one is not zero, 0 without an update.
        skeleton_energy: PMSS only: ``||P_C W P_R||^2 / ||W||^2`` with the projections on the spans of the selected columns
            and rows, the share of the weight's energy in the subspace of the update.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    u_norm: float
    update_norm: float | None = None
    relative_norm: float | None = None
    singular_values: list[float] | None = None
    effective_rank: float | None = None
    skeleton_energy: float | None = None


@dataclass(frozen=True)
class Inspection:
    """Figures of an adapter, layer by layer; ``print`` it for a table.

    Attributes:
        adapter: Folder of the adapter.
        base: Folder of the base, if it was read.
        base_model: Id or path of the base that the adapter names.
        revision: Commit of the base.
        bytes: Size of the weights file.
        config: Options of the conversion (`AdapterConfig`).
        layers: One entry per converted layer.
        options: The most important options in a few words.
        trained: Number of trained parameters in the layers.
        also_train: Name -> shape of the tensors trained in full.
        fresh: Name -> shape of the frozen tensors that no file of the base contains.
    """

    adapter: str
    base: str | None
    base_model: str | None
    revision: str | None
    bytes: int
    config: dict[str, Any]
    layers: list[InspectedLayer]
    options: str
    trained: int
    also_train: dict[str, list[int]] = field(default_factory=dict)
    fresh: dict[str, list[int]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        named = self.base_model or "not recorded"
        lines = [f"{self.adapter}: {len(self.layers)} layers, {self.bytes / 1e6:.2f} MB; base {named}"]
        if self.revision:
            lines[0] += f", revision {self.revision}"
        lines.append(", ".join(f"{key} {self.config[key]}" for key in _OPTIONS if key in self.config))
        head, cells = _COLUMNS[:4], [[_cell(layer) for _, _cell in _COLUMNS] for layer in self.layers]
        if self.base is not None:
            head = _COLUMNS
        rows = [[title for title, _ in head], *(row[: len(head)] for row in cells)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
        table = [
            "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        ]
        lines += [table[0], "-" * len(table[0]), *table[1:]]
        if self.also_train:
            lines.append("trained in full: " + ", ".join(f"{n} {shape}" for n, shape in self.also_train.items()))
        if self.fresh:
            lines.append("in no file of the base: " + ", ".join(f"{n} {shape}" for n, shape in self.fresh.items()))
        if self.base is None:
            lines.append("Norms of the update and its singular values need the base: give --base MODEL_DIR.")
        return "\n".join(lines)


def inspect_adapter(
    adapter: str | os.PathLike[str], base: str | os.PathLike[str] | None = None, *, progress: bool = False
) -> Inspection:
    """Inspect an adapter folder, with more figures if the base is given.

    Args:
        adapter: Folder written by `save_adapter`.
        base: Folder of the base's safetensors; only the adapter's layers are read, one at a time.
        progress: Show a progress bar while the base is read.

    Raises:
        FileNotFoundError: Adapter or base or one of their files is missing.
        ValueError: A damaged adapter, another base than the adapter's, or a quantised one.
    """
    trained = read_adapter(adapter)
    layers = [_without_base(name, module) for name, module in trained.modules.items()]
    if base is not None:
        layers = _with_base(trained, Path(base).expanduser(), progress)
    return Inspection(
        adapter=str(trained.folder),
        base=None if base is None else str(base),
        base_model=trained.base_model,
        revision=trained.revision,
        bytes=(trained.folder / WEIGHTS_FILE).stat().st_size,
        config=trained.config,
        layers=layers,
        options=f"rank {trained.options.rank}, {trained.options.summary()}",
        trained=_trained(trained),
        also_train={name: list(value.shape) for name, value in trained.also_train.items()},
        fresh={name: list(kept.shape) for name, kept in trained.fresh.items()},
    )


def _trained(adapter: AdapterFile) -> int:
    method = method_of(adapter.options)
    specs = [s for m in adapter.modules.values() for s in method.specs(m.shape, m.update.width).values()]
    return sum(math.prod(spec.shape) for spec in specs if spec.kind is Kind.TRAINED)


def update_spectrum(factors: Factors) -> Tensor:
    """Compute all singular values of an update in float64, largest first, without forming it."""
    t_b, t_a = (torch.linalg.qr(part.double(), mode="r").R for part in (factors.b, factors.a.T))
    return torch.linalg.svdvals(t_b @ t_a.T)


def effective_rank(singular: Tensor) -> float:
    """Compute `InspectedLayer.effective_rank` from the singular values."""
    if not bool((singular > 0).any()):
        return 0.0
    share = singular / singular.sum()
    return float(torch.special.entr(share).sum().exp())


def skeleton_energy(weight: Tensor, rows: Tensor, columns: Tensor) -> tuple[float, float]:
    """Compute ``||P_C W P_R||^2 / ||W||^2`` and ``||W||_F``.

    Args:
        weight: W ``[out, in]``, any floating dtype; cast to float32 (float64 stays) block by block.
        rows: R ``[r, in]``.
        columns: C ``[out, c]``.
    """
    return _energy(weight, torch.linalg.qr(columns.double()), torch.linalg.qr(rows.T.double()))


def _energy_of_rows(weight: Tensor, rows: Tensor) -> tuple[float, float]:
    """``||W P_R||^2 / ||W||^2`` and ``||W||_F``: for a one-sided skeleton, whose update has no columns of W."""
    q, triangle = torch.linalg.qr(rows.double().T)
    basis = q @ _spanned(triangle)
    inside = total = 0.0
    step = max(1, _BLOCK // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        block = weight[start : start + step].to(basis.dtype)
        inside += float((block @ basis).square().sum())
        total += float(block.square().sum())
    return (inside / total if total else 0.0), total**0.5


def _energy(weight: Tensor, of_c: tuple[Tensor, Tensor], of_r: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Compute `skeleton_energy` from the thin QR of C and of R^T."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    q_c, q_r = of_c[0].to(wide), of_r[0].to(wide)
    inside, total = torch.zeros(q_c.shape[1], q_r.shape[1], dtype=torch.float64), 0.0
    step = max(1, _BLOCK // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        block = weight[start : start + step].to(wide)
        inside += (q_c[start : start + step].T @ (block @ q_r)).double()
        total += float(torch.linalg.vector_norm(block, dtype=torch.float64)) ** 2
    # QR of linearly dependent columns returns further directions, outside of their span: remove those.
    left, right = (_spanned(triangle) for _, triangle in (of_c, of_r))
    return (float((left.T @ inside @ right).square().sum()) / total if total else 0.0), total**0.5


def _spanned(triangle: Tensor) -> Tensor:
    left, singular, _ = torch.linalg.svd(triangle)
    kept: Tensor = left[:, singular > singular[0] * 1e-6]
    return kept


def _without_base(name: str, module: AdapterModule) -> InspectedLayer:
    update = module.update
    norm = math.sqrt(
        sum(float(torch.linalg.vector_norm(t, dtype=torch.float64)) ** 2 for t in update.numbers().values())
    )
    return InspectedLayer(name, module.shape, update.rank, norm)


@torch.no_grad()
def _with_base(adapter: AdapterFile, base: Path, progress: bool) -> list[InspectedLayer]:
    layers = []
    with open_shards(base) as reader:
        source = file_source(adapter, reader)
        for name in tqdm(adapter.modules, desc="inspecting", unit="layer", disable=not progress):
            update, weight = source.update(name), source.weight(name)
            singular = update_spectrum(thin(update, weight, name, cut=True))  # of an update without thin factors, too
            energy = None
            reads = update.read(weight) if update.indices() else ()  # of a skeleton, not all of W
            if len(reads) == 1:
                energy, size = _energy_of_rows(weight, *reads)
            elif reads:
                energy, size = _energy(weight, *(torch.linalg.qr(part.double()) for part in (reads[1], reads[0].T)))
            else:
                size = float(torch.linalg.vector_norm(weight, dtype=torch.float64))
            norm = float(torch.linalg.vector_norm(singular))
            known = _without_base(name, adapter.modules[name])
            layers.append(
                InspectedLayer(
                    known.name,
                    known.shape,
                    known.rank,
                    known.u_norm,
                    update_norm=norm,
                    relative_norm=norm / size if size else 0.0,
                    singular_values=singular.tolist(),
                    effective_rank=effective_rank(singular),
                    skeleton_energy=energy,
                )
            )
    return layers


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


_OPTIONS = ("rank", "scale", "alpha", "selection", "row_mode", "coordinates", "target_modules", "also_train")
_COLUMNS: list[tuple[str, Callable[[InspectedLayer], str]]] = [
    ("module", lambda layer: layer.name),
    ("out x in", lambda layer: f"{layer.shape[0]} x {layer.shape[1]}"),
    ("rank", lambda layer: str(layer.rank)),
    ("|sU|", lambda layer: _number(layer.u_norm)),
    ("|update|", lambda layer: _number(layer.update_norm)),
    ("of |W|", lambda layer: _number(layer.relative_norm)),
    ("eff. rank", lambda layer: "" if layer.effective_rank is None else f"{layer.effective_rank:.1f}"),
    ("largest singular values", lambda layer: " ".join(_number(v) for v in (layer.singular_values or [])[:_SHOWN])),
    ("skeleton", lambda layer: "" if layer.skeleton_energy is None else f"{layer.skeleton_energy:.1%}"),
]
