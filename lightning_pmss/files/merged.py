"""Write a merged model: stream it from the base's files, or save a live model.

The streaming merge needs neither the model class nor memory for the model: it reads the base's safetensors one tensor at a
time, adds the update to the adapter's layers, and copies the other tensors. Peak memory is the adapter, one shard (mapped),
one matrix and its merged copy.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lightning_pmss.conversion.converted import beside_root, chosen_scope, conversion_of
from lightning_pmss.conversion.roots import adapted_root
from lightning_pmss.files.adapter_file import AdapterFile, FreshTensor, read_adapter
from lightning_pmss.files.base import base_of
from lightning_pmss.files.model_folder import (
    BesideWeights,
    FileMergeReport,
    beside_weights,
    change_settings,
    copy_beside,
    refuse_outside,
    refuse_overlap,
    write_report,
)
from lightning_pmss.files.naming import parse_dtype, refuse_misfits, refuse_wrong_base, resolve_names
from lightning_pmss.files.processing import copy_processing, save_processing
from lightning_pmss.layers.convertible import FLOATS
from lightning_pmss.layers.merged_layer import merge_update
from lightning_pmss.layers.plain_state import without_quantiser
from lightning_pmss.merging import merged_state
from lightning_pmss.store.atomic import atomic_folder, check_target
from lightning_pmss.store.expert_tensors import ExpertTensor
from lightning_pmss.store.kinds import MERGED, SHARDS, matches
from lightning_pmss.store.shards import (
    SINGLE_FILE,
    ShardReader,
    ShardWriter,
    TensorInfo,
    few,
    open_shards,
    parse_size,
    plan_shards,
    save_tensors,
    shard_names,
    write_index,
)

OUTSIDE_FILE = "other_modules.safetensors"
_IN_PYTHON = "load_adapter(model, folder), then write_merged(model, output)."
_QUANTISED = (
    "a quantised form that cannot be merged into. Give the unquantised base; if the adapter was trained on these quantised"
    f" weights, merge in Python instead: {_IN_PYTHON}"
)


def merge_files(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | AdapterFile,
    output: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    max_shard_size: str | int | None = "5GB",
    dtype: str | torch.dtype | None = None,
    progress: bool = True,
    tokenizer: Any = None,
) -> FileMergeReport:
    """Merge an adapter into a base on disk, tensor by tensor, and write a complete model folder.

    ``W' = W + C (s U) R`` is computed from the base's W in float32 (float64 for a float64 base) and rounded once.

    Args:
        base: Folder with config.json and safetensors weights, single or sharded, or a safetensors file with a state dict.
        adapter: Folder written by `save_adapter`, or an adapter read from one.
        output: Folder to write; appears only when it is complete.
        overwrite: Replace an earlier output.
        max_shard_size: Largest shard (``"5GB"``, bytes, or None for no limit); the base's shards are kept if all fit.
        dtype: Dtype of the merged model's floating-point weights (``"float32"``, ...); None keeps the base's.
        progress: Show a progress bar.
        tokenizer: See `write_merged`.

    Raises:
        FileNotFoundError: Base or adapter or one of their files is missing.
        FileExistsError: See `atomic_folder`.
        ValueError: Another base than the adapter's, a module not found in the base, NaN or infinite results, an
            output equal to, inside or around base or adapter, unreadable files.
    """
    base, output = Path(base).expanduser(), Path(output).expanduser()
    inputs = {"base": base}
    if not isinstance(adapter, AdapterFile):
        inputs["adapter"] = adapter = Path(adapter).expanduser()
    refuse_overlap(output, inputs)
    check_target(output, MERGED, overwrite=overwrite)
    target_dtype = parse_dtype(dtype, "the base's")
    limit = None if max_shard_size is None else parse_size(max_shard_size)
    trained = adapter if isinstance(adapter, AdapterFile) else read_adapter(adapter)
    with open_shards(base) as reader:
        rename = resolve_names(trained, reader, base, _IN_PYTHON, _QUANTISED)
        refuse_misfits(trained, reader, rename)
        plan = _Plan(trained, reader, rename, target_dtype)
        rows = {info.shape[0] for info in plan.tensors if info.shape}
        if odd := [name for name, value in trained.settings.items() if type(value) is int and value not in rows]:
            raise ValueError(
                f"{trained.folder}: no tensor of the merged model has the size in its settings ({few(odd)}). It is"
                " damaged or was edited by hand. Use an earlier adapter or checkpoint."
            )
        shards = plan_shards(plan.tensors, limit)
        kept = [shard[0].file for shard in shards]
        # The base's file names are kept only if they have the usual form and the division is unchanged.
        usual = all(matches(name, SHARDS) for name in kept) and len(set(kept)) == len(kept) == len(reader.files)
        names = kept if usual and len(shards) > 1 else shard_names(len(shards))
        # A lone safetensors file has no config or tokenizer beside it.
        beside = beside_weights(base) if base.is_dir() else BesideWeights({}, {}, [])
        refuse_outside(base, beside)
        report = FileMergeReport(
            str(output), replaced=plan.replaced, added=plan.added, not_copied=beside.not_copied(), shards=names
        )
        with atomic_folder(output, MERGED, overwrite=overwrite) as folder:
            save_processing(tokenizer, folder)
            if isinstance(adapter, Path):
                copy_processing(adapter, folder)
            report.copied_files = copy_beside(beside, folder, target_dtype)
            change_settings(folder, trained.settings, plan.sizes)
            _write_shards(plan, dict(zip(names, shards, strict=True)), folder, report, progress)
            write_index(folder, dict(zip(names, shards, strict=True)), reader.metadata)
            write_report(folder, report, base_model=trained.base_model, revision=trained.revision)
    return report


@torch.no_grad()
def write_merged(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    tokenizer: Any = None,
    overwrite: bool = False,
) -> FileMergeReport:
    """Write a live model with its adapter merged, so that it loads without this library and without Lightning.

    A Hugging Face model (also inside a LightningModule) is written by its own ``save_pretrained``, for ``from_pretrained``;
    parameters outside of it go to ``other_modules.safetensors``. Any other module gives ``model.safetensors``, a plain state
    dict with the original keys. If the conversion had a ``root``, only that module is written, and modules beside it that were
    trained in full. The model itself is not changed and may be merged or not. A sharded one is gathered on rank 0's CPU: call
    this function on every rank; rank 0 writes.

    Args:
        model: Converted by `convert`, the callback or `load_adapter`.
        folder: Written whole or not at all.
        base: Folder of the base, from which tokenizer files and the like are copied; default: the folder or the snapshot in
            the hub's cache that the Hugging Face model was loaded from.
        tokenizer: A tokenizer or processor, or a list of them, written by ``save_pretrained``; replaces the base's files.
        overwrite: Replace an earlier output.

    Raises:
        FileExistsError: See `atomic_folder`.
        ValueError: No converted layer, NaN or infinite merged weights, or a folder equal to, inside or around `base`.
    """
    target = Path(folder).expanduser()
    root, prefix = adapted_root(model)
    known = base_of(model)
    source = _source(base or known.folder)
    if source is not None and (base is not None or target.resolve() == source.resolve()):
        # A base that was not named explicitly may contain the output folder of a run.
        refuse_overlap(target, {"base": source})
    check_target(target, MERGED, overwrite=overwrite)
    under, report_of = None, conversion_of(model)
    if (scope := chosen_scope(model)) is not None and report_of is not None:
        under = [scope, *beside_root(model, report_of.also_train)]
    state, drift = merged_state(model, under)
    if not state:  # a sharded model, and this is not rank 0
        return FileMergeReport(str(target))
    if strange := [key for key, value in state.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"safetensors stores only tensors; the state dict of the model has {few(strange)}.")
    report = FileMergeReport(str(target), merged=drift)
    with atomic_folder(target, MERGED, overwrite=overwrite) as temporary:
        save_pretrained = getattr(root, "save_pretrained", None)
        inside = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        outside = {key: value for key, value in state.items() if not key.startswith(prefix)}
        if save_pretrained is not None:
            with without_quantiser(root):
                save_pretrained(temporary, state_dict=inside)
        else:
            save_tensors(inside, temporary / SINGLE_FILE)
        if outside:
            save_tensors(outside, temporary / OUTSIDE_FILE)
        save_processing(tokenizer, temporary)
        if source is not None and save_pretrained is not None:
            beside = beside_weights(source)
            report.copied_files, report.not_copied = copy_beside(beside, temporary, None), beside.not_copied()
        report.shards = sorted(path.name for path in temporary.glob("*.safetensors"))
        write_report(temporary, report, base_model=str(base or known.name or "") or None)
    return report


def _source(base: str | os.PathLike[str] | None) -> Path | None:
    """Return the base's folder, or None if it has no config.json."""
    folder = Path(base).expanduser() if base else None
    return folder if folder is not None and (folder / "config.json").is_file() else None


class _Plan:
    """Source, shape and dtype of every tensor of the merged model."""

    def __init__(
        self, adapter: AdapterFile, reader: ShardReader, rename: Callable[[str], str], dtype: torch.dtype | None
    ) -> None:
        self.adapter, self.reader, self.rename = adapter, reader, rename
        self.modules = {f"{rename(name)}.weight": name for name in adapter.modules}
        self.experts: dict[str, list[ExpertTensor]] = {}  # the matrices that a tensor of the base has a part of
        for key in self.modules.keys() - reader.tensors.keys() & reader.experts.keys():
            for part in reader.experts[key].parts:
                self.experts.setdefault(part, []).append(replace(reader.experts[key], key=key))
        self._last: tuple[str, Tensor] | None = None  # the matrix merged last: its parts are often neighbours
        self.trained: dict[str, Tensor] = {}
        self.kept: dict[str, FreshTensor] = {}
        self.resized: dict[str, TensorInfo] = {}
        self.replaced: list[str] = []
        self.added: list[str] = []
        extra: list[TensorInfo] = []
        for name, value in adapter.also_train.items():
            # A tied tensor is stored under only one of its names.
            aliases = [rename(name), *(rename(alias) for alias in adapter.tied.get(name, ()))]
            present = [key for key in aliases if key in reader.tensors]
            for key in present or aliases[:1]:
                if key in self.modules:
                    raise ValueError(f"{adapter.folder}: {key} is both a converted layer and trained in full.")
                self.trained[key] = value
                if present and reader.tensors[key].shape[1:] != tuple(value.shape)[1:]:
                    raise ValueError(
                        f"{adapter.folder}: {name} has the shape {list(value.shape)}, the base's {key} "
                        f"{list(reader.tensors[key].shape)}. This is not the base the adapter was trained on."
                    )
                self._note(key, value.dtype, tuple(value.shape), extra)
        for name, fresh in adapter.fresh.items():
            aliases = [rename(name), *(rename(alias) for alias in adapter.tied.get(name, ()))]
            present = [key for key in aliases if key in reader.tensors]
            if fresh.start and any(reader.tensors[key].shape[0] < fresh.start for key in present):
                raise ValueError(
                    f"{adapter.folder}: {name} takes its first {fresh.start} rows from the base, whose {present[0]} has"
                    f" {reader.tensors[present[0]].shape[0]}. This is not the base the adapter was trained on."
                )
            for key in present or aliases[:1]:
                self.kept[key] = fresh
                self._note(key, fresh.value.dtype, fresh.shape, extra)
        infos = [self.resized.get(info.key, info) for info in reader.tensors.values()] + extra
        self.tensors = [
            TensorInfo(info.key, dtype if dtype and info.dtype in FLOATS else info.dtype, info.shape, info.file)
            for info in infos
        ]

    def merged(self, key: str, dtype: torch.dtype, report: FileMergeReport, stored: Tensor | None = None) -> Tensor:
        """W' ``[out, in]`` of a layer, by its key.

        Args:
            key: In `modules`.
            dtype: Of the result.
            report: Gets what the rounding cost.
            stored: The base's weight, where it was read already.
        """
        if self._last is not None and self._last[0] == key:
            return self._last[1]
        name = self.modules[key]
        module = self.adapter.modules[name]
        weight = module.canonical(self.reader.read(key) if stored is None else stored)
        if not module.is_of(weight):
            refuse_wrong_base(self.adapter, self.reader, self.rename, name)
        try:
            value, report.merged[name] = merge_update(weight, module.update, dtype, name)
        except ValueError as error:
            remedy = "" if bool(weight.isfinite().all()) else " The base's own weights are not finite."
            raise ValueError(f"merging {name} in {dtype}: {error} Try dtype='float32'.{remedy}") from error
        if key in self.reader.experts:
            self._last = key, value
        return value

    def merged_experts(self, info: TensorInfo, report: FileMergeReport) -> Tensor:
        """A tensor of the base with the merged matrices of its experts, as the base keeps it."""
        whole = torch.empty(info.shape, dtype=info.dtype)
        for expert in self.experts[info.key]:
            value = self.merged(expert.key, info.dtype, report)
            if expert.index is not None:
                whole[expert.index] = expert.back(value)
                continue
            before = expert.parts[: expert.parts.index(info.key)]
            start = sum(self.reader.tensors[part].shape[0] for part in before)
            whole.copy_(value[start : start + info.shape[0]])
        return whole

    def _note(self, key: str, dtype: torch.dtype, shape: tuple[int, ...], extra: list[TensorInfo]) -> None:
        """Plan a tensor that replaces the base's, or that the base does not have."""
        stored = self.reader.tensors.get(key)
        (self.added if stored is None else self.replaced).append(key)
        if stored is None:
            extra.append(TensorInfo(key, dtype, shape, self.reader.files[-1]))
        elif stored.shape != shape:
            self.resized[key] = TensorInfo(key, stored.dtype, shape, stored.file)

    @property
    def sizes(self) -> dict[int, int]:
        """Old -> new number of rows of the tensors that grew or shrank."""
        return {self.reader.tensors[key].shape[0]: info.shape[0] for key, info in self.resized.items()}


def _write_shards(
    plan: _Plan, shards: Mapping[str, list[TensorInfo]], folder: Path, report: FileMergeReport, progress: bool
) -> None:
    size = sum(info.bytes for shard in shards.values() for info in shard)
    with tqdm(total=size, unit="B", unit_scale=True, desc="merging", disable=not progress) as bar:
        for name, shard in shards.items():
            with ShardWriter(folder / name, shard) as writer:
                for info in writer.plan:
                    writer.write(info.key, _output_tensor(plan, info, report))
                    bar.update(info.bytes)


def _output_tensor(plan: _Plan, info: TensorInfo, report: FileMergeReport) -> Tensor:
    if info.key in plan.trained:
        return _cast(plan.trained[info.key], info)
    if info.key in plan.experts:
        return plan.merged_experts(info, report)
    fresh = plan.kept.get(info.key)
    stored = plan.reader.read(info.key) if fresh is None else fresh.whole(lambda: plan.reader.read(info.key))
    if info.key not in plan.modules:
        return _cast(stored, info)
    value = plan.merged(info.key, info.dtype, report, stored)
    return plan.adapter.modules[plan.modules[info.key]].layout.stored(value, info.shape)


def _cast(value: Tensor, info: TensorInfo) -> Tensor:
    """Cast a tensor to the dtype to write; refuse finite values that would overflow."""
    result = value.to(info.dtype)
    if value.dtype != info.dtype and not bool(result.isfinite().all()) and bool(value.isfinite().all()):
        raise ValueError(
            f"{info.key} is too large for {info.dtype}; nothing is written. Try dtype='float32' or 'bfloat16'."
        )
    return result
