"""Combine adapter folders of any methods and ranks into one LoRA adapter, layer by layer, without building the model."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from lightning_pmss.files.adapter_file import AdapterFile, AdapterModule, read_adapter, write_adapter
from lightning_pmss.files.lora_source import Source, file_source, refuse_fresh_layers, thin
from lightning_pmss.files.model_folder import refuse_overlap
from lightning_pmss.files.peft_experts import experts_of
from lightning_pmss.layers.expert_layer import is_expert_name
from lightning_pmss.layers.layout import Layout
from lightning_pmss.messages import some
from lightning_pmss.methods import method_of
from lightning_pmss.methods.lora import LoRAConfig, LoRAUpdate
from lightning_pmss.methods.method import Factors
from lightning_pmss.named.rules import ANY_UPDATE, SAME_RANKS, Rule
from lightning_pmss.store import not_finite
from lightning_pmss.store.atomic import check_target
from lightning_pmss.store.kinds import ADAPTER
from lightning_pmss.store.shards import few, open_shards


@dataclass(frozen=True)
class Survival:
    """How much of one adapter is in the combination, over the layers that it has.

    Attributes:
        adapter: Its folder.
        weight: Its weight.
        layers: How many layers it has.
        norm: Frobenius norm of its whole update.
        share: The combination's part along it, over its norm: 1 where all of it is there.
        cosine: Between it and the combination.
        lowest: The layer of the lowest cosine, and that cosine.
    """

    adapter: str
    weight: float
    layers: int
    norm: float
    share: float
    cosine: float
    lowest: tuple[str, float]


@dataclass(frozen=True)
class CombinedFiles:
    """Report of `combine_files`, to ``print``.

    Attributes:
        output: The folder.
        rule: Name of the rule.
        ranks: Rank of each layer.
        sources: An entry per adapter.
    """

    output: str
    rule: str
    ranks: Mapping[str, int]
    sources: Sequence[Survival]

    def __str__(self) -> str:
        width = max(len(source.adapter) for source in self.sources)
        lines = [
            f"LoRA of rank {max(self.ranks.values())} at most, {len(self.ranks)} layers, by {self.rule}, in {self.output}",
            f"{'adapter':<{width}}  weight  layers      norm   share  cosine  lowest cosine",
        ]
        for s in self.sources:
            lines.append(
                f"{s.adapter:<{width}}  {s.weight:6.3g}  {s.layers:6}  {s.norm:8.4g}  {s.share:6.3f}  {s.cosine:6.3f}"
                f"  {s.lowest[1]:.3f} ({s.lowest[0]})"
            )
        return "\n".join(lines)


@torch.no_grad()
def combine_files(
    base: str | os.PathLike[str],
    adapters: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    rule: str,
    rank: int | None = None,
    weights: Sequence[float] | None = None,
    density: float | None = None,
    seed: int = 0,
    units: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> CombinedFiles:
    """Write one LoRA adapter that combines others of the same base; it trains on, merges and exports as every adapter.

    Each update is used as its exact LoRA, whatever its method. W is read one layer at a time; what is written is in memory.

    Args:
        base: Folder of the base's safetensors.
        adapters: Folders written by `save_adapter`, at least two.
        output: Folder to write; appears only when it is complete.
        rule: See `lightning_pmss.named.rules`.
        rank: Of the result, for ``lego`` and ``svd``.
        weights: One per adapter; 1 each if not given. Negative ones subtract.
        density: Share of the entries kept, for ``ties``, ``dare_*`` and ``magnitude_prune``.
        seed: Of the k-means and of the draws.
        units: What ``lego`` clusters: "aligned" (if not given), "raw" or "normalised"; see `lightning_pmss.named.rules.UNITS`.
        overwrite: Replace an earlier adapter.
        progress: Show a progress bar.

    Returns:
        A report to ``print``.

    Raises:
        FileNotFoundError: A folder or file is missing.
        FileExistsError: See `atomic_folder`.
        ModuleNotFoundError: The rule uses peft or scikit-learn, which is not installed.
        ValueError: Options that do not fit, another base than an adapter's, adapters with modules trained in full or fresh
            tensors, no layer in common, updates that are no product of thin matrices, or values that are not finite.
    """
    chosen = Rule(rule, rank, density, seed, units)
    base, target, folders = Path(base).expanduser(), Path(output).expanduser(), [Path(a).expanduser() for a in adapters]
    factors = _weights(weights, folders)
    refuse_overlap(target, {"base": base} | {f"adapter {n}": folder for n, folder in enumerate(folders, 1)})
    check_target(target, ADAPTER, overwrite=overwrite)
    files = [read_adapter(folder) for folder in folders]
    _refuse(files)
    with open_shards(base) as reader:
        sources = [file_source(file, reader) for file in files]
        modules, measured = _combine(chosen, files, sources, factors, progress)
    modules = _filled(modules)
    ranks = {name: module.update.rank for name, module in modules.items()}
    usual = max(ranks.values())
    first = files[0]
    fused = experts_of(ranks)
    of_all = {name: ranks[group[0]] for name, group in fused.items()}
    alone = {name: r for name, r in ranks.items() if not is_expert_name(name)}
    matrices = [name for name in alone if modules[name].layout is Layout.PARAMETER]
    options = LoRAConfig(
        target_modules=[name for name in alone if name not in matrices],
        target_parameters=[*fused, *matrices],
        rank=usual,
        rank_pattern={name: r for name, r in (alone | of_all).items() if r != usual},
        alpha=float(usual),
    )
    combined = AdapterFile(
        target, options, first.base_model, first.revision, modules, first.model_class, root=first.root
    )
    write_adapter(combined, target, overwrite=overwrite, base=base if base.is_dir() else None)
    found = [_survival(str(f), w, m) for f, w, m in zip(folders, factors, measured, strict=True)]
    return CombinedFiles(str(target), rule, ranks, found)


def _weights(weights: Sequence[float] | None, folders: Sequence[Path]) -> list[float]:
    if len(folders) < 2:
        raise ValueError(f"adapters={[str(f) for f in folders]}: give at least two adapter folders to combine.")
    found = [1.0] * len(folders) if weights is None else [float(weight) for weight in weights]
    if len(found) != len(folders):
        raise ValueError(f"weights={found}: give one number per adapter; there are {len(folders)}.")
    if not all(math.isfinite(weight) and weight for weight in found):
        raise ValueError(f"weights={found}: each must be a finite number other than 0; leave an adapter out instead.")
    return found


def _refuse(files: Sequence[AdapterFile]) -> None:
    for file in files:
        refuse_fresh_layers(file.fresh, file.modules)
        if extra := [*file.also_train, *file.fresh]:
            raise ValueError(
                f"{file.folder} has {few(sorted(extra))} trained in full or fresh, of which a combination means nothing."
                " Combine adapters that were trained without also_train, or merge one into the base first."
            )
    first, *others = files
    for other in others:
        if not first.modules.keys() & other.modules.keys():
            raise ValueError(f"{first.folder} and {other.folder} have no layer in common, so nothing is combined.")
        for name in first.modules.keys() & other.modules.keys():
            if first.modules[name].shape != other.modules[name].shape:
                raise ValueError(
                    f"{name} is {list(first.modules[name].shape)} in {first.folder} and {list(other.modules[name].shape)} in"
                    f" {other.folder}: these adapters have different bases."
                )


_Measured = dict[str, tuple[float, float, float]]
"""Of one adapter by layer: its squared norm, its product with the combination, the combination's squared norm."""


def _combine(
    rule: Rule, files: Sequence[AdapterFile], sources: Sequence[Source], weights: Sequence[float], progress: bool
) -> tuple[dict[str, AdapterModule], list[_Measured]]:
    names = list(dict.fromkeys(name for file in files for name in file.modules))
    modules: dict[str, AdapterModule] = {}
    measured: list[_Measured] = [{} for _ in files]
    for name in tqdm(names, unit="layer", desc="combining", disable=not progress):
        owners = [i for i, file in enumerate(files) if name in file.modules]
        parts: list[tuple[float, Factors]] = []
        given: list[tuple[float, Factors]] = []
        for i in owners:
            update = files[i].modules[name].update
            part = thin(update, sources[i].weight(name), name, cut=rule.name in ANY_UPDATE)
            parts.append((weights[i], Factors(part.a.double(), part.b.double())))
            given.append(_as_in_peft(*parts[-1], files[i], name) if rule.name in SAME_RANKS else parts[-1])
        try:
            total = rule.combined(given, name)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        like = files[owners[0]].modules[name]
        update_of_all = LoRAUpdate(A=total.a.float().contiguous(), B=total.b.float().contiguous())
        if broken := not_finite(update_of_all.numbers()):
            raise ValueError(
                f"{name}: NaN or infinite values in {some(broken)} of the combination; nothing is written."
            )
        modules[name] = AdapterModule(like.shape, like.layout, {}, update_of_all.narrowed(like.shape))
        whole = _inner(total, total)
        for i, (_, part) in zip(owners, parts, strict=True):
            measured[i][name] = (_inner(part, part), _inner(part, total), whole)
    return modules, measured


def _as_in_peft(weight: float, part: Factors, file: AdapterFile, name: str) -> tuple[float, Factors]:
    """Move a LoRA's ``alpha / r`` from B to the weight, where peft's rules have it: they elect signs before they weigh."""
    if not isinstance(file.options, LoRAConfig):
        return weight, part
    scale = file.options.scale_of(len(part.a), file.modules[name].shape)
    return weight * scale, Factors(part.a, part.b / scale)


def _filled(modules: Mapping[str, AdapterModule]) -> dict[str, AdapterModule]:
    """The same, filled up where a rule left nothing (rank 0), and where experts of one parameter got several ranks.

    What is filled in is LoRA's own start, which changes nothing and can be trained: rows of A, and zeros of B.
    """
    wanted = {name: max(1, module.update.rank) for name, module in modules.items()}
    for group in experts_of(modules).values():
        wanted |= dict.fromkeys(group, max(wanted[name] for name in group))
    return {name: _of_rank(module, wanted[name], name) for name, module in modules.items()}


def _of_rank(module: AdapterModule, rank: int, name: str) -> AdapterModule:
    update = module.update
    assert isinstance(update, LoRAUpdate)
    if update.rank == rank:
        return module
    rows = method_of(LoRAConfig()).start(module.shape, rank, name)["A"][update.rank :]
    return replace(module, update=LoRAUpdate(torch.cat([update.A, rows]), F.pad(update.B, (0, len(rows)))))


def _inner(one: Factors, two: Factors) -> float:
    """``<B1 A1, B2 A2>``, of thin products alone."""
    product: Tensor = (one.b.T @ two.b) * (one.a @ two.a.T)
    return float(product.sum())


def _survival(adapter: str, weight: float, layers: _Measured) -> Survival:
    own, common, whole = (sum(values) for values in zip(*layers.values(), strict=True))
    cosines = {name: _cosine(*values) for name, values in layers.items()}
    lowest = min(cosines, key=lambda name: cosines[name])
    return Survival(
        adapter=adapter,
        weight=weight,
        layers=len(layers),
        norm=math.sqrt(max(own, 0.0)),
        share=common / own if own > 0 else 0.0,
        cosine=_cosine(own, common, whole),
        lowest=(lowest, cosines[lowest]),
    )


def _cosine(own: float, common: float, whole: float) -> float:
    return common / math.sqrt(own * whole) if own > 0 and whole > 0 else 0.0
