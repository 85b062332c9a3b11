"""An adapter folder as peft writes it: its config and its tensors, for every kind of adapter that is imported."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict
from torch import Tensor

from lightning_pmss.files.adapter_file import CONFIG_FILE, WEIGHTS_FILE, AdapterFile, AdapterModule
from lightning_pmss.files.naming import Wording, match_names
from lightning_pmss.methods.config import AdapterConfig
from lightning_pmss.store import Record, not_finite, read_json, read_tensors
from lightning_pmss.store.shards import ShardReader, few

PREFIX = "base_model.model."  # of peft's keys
AGAIN = "Copy the folder again, or write it anew with peft."
IN_PEFT = "PeftModel.from_pretrained(model, folder).merge_and_unload()."
# Fields that say which layers the tensors are for, as their names do, or matter in training only.
_HARMLESS = {
    "auto_mapping", "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform", "modules_to_save",
    "peft_version", "rank_pattern", "runtime_config", "target_modules", "task_type",
}  # fmt: skip
QUANTISED = "a quantised form, whose shapes cannot be compared. Give the unquantised base."


class PeftRecord(Record):
    """Fields of every ``adapter_config.json`` of peft that are read; `refuse_fields` judges the others."""

    model_config = ConfigDict(extra="allow")

    base_model_name_or_path: str | None = None
    revision: str | None = None


def refuse_fields(record: PeftRecord, kind: str, where: str, harmless: Collection[str] = ()) -> None:
    """Refuse fields that are set, are not read, and may change what the tensors mean.

    Args:
        record: As read.
        kind: Name of the adapter type.
        where: The file, for messages.
        harmless: Fields of this type that matter in training only.

    Raises:
        ValueError: The message names the fields.
    """
    known = _HARMLESS.union(harmless)
    if found := [
        f"{name}={value!r}" for name, value in (record.model_extra or {}).items() if value and name not in known
    ]:
        raise ValueError(
            f"{where} has {few(found)}, which {kind} here cannot express. Merge it with peft instead: {IN_PEFT}"
        )


def read_config(folder: Path) -> Any:
    """The content of ``adapter_config.json``, not checked yet.

    Raises:
        FileNotFoundError: The folder or one of its two files is missing.
        ValueError: It is damaged.
    """
    if missing := [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} lacks {' and '.join(missing)}: not a complete adapter folder of peft.")
    return read_json(folder / CONFIG_FILE, AGAIN)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of ``adapter_model.safetensors`` under peft's keys.

    Raises:
        ValueError: The file is damaged, or has NaN or infinite values.
    """
    tensors = read_tensors(folder / WEIGHTS_FILE, AGAIN)
    if broken := not_finite(tensors):
        raise ValueError(f"{folder / WEIGHTS_FILE}: NaN or infinite values in {few(broken)}. Use an earlier adapter.")
    return tensors


def sort_tensors(
    tensors: Mapping[str, Tensor], kind: str, ends: Mapping[str, str], marks: Collection[str], where: str
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Sort peft's tensors into those of the layers, by layer and part, and those trained in full, by name.

    Args:
        tensors: Under peft's keys.
        kind: Name of the adapter type.
        ends: The part that each end of a key means.
        marks: What the names of this type's other tensors contain.
        where: The file, for messages.

    Raises:
        ValueError: A tensor of neither kind, a layer without one of its parts, or no layer.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    full: dict[str, Tensor] = {}
    for key, value in tensors.items():
        name = key.removeprefix(PREFIX)
        if end := next((end for end in ends if name.endswith(f".{end}")), None):
            layers.setdefault(name.removesuffix(f".{end}"), {})[ends[end]] = value
        elif any(mark in name for mark in marks) or not key.startswith(PREFIX):
            raise ValueError(f"{where}: {key} is not a tensor of {kind}. Merge it with peft instead: {IN_PEFT}")
        else:
            full[name] = value
    if half := [name for name, parts in layers.items() if parts.keys() != set(ends.values())]:
        raise ValueError(f"{where} lacks one of the two factors of {few(half)}. {AGAIN}")
    if not layers:
        raise ValueError(f"{where} has no layers of {kind}. {AGAIN}")
    return layers, full


def drop_copies(layers: Iterable[str], full: dict[str, Tensor], kind: str, folder: Path, reader: ShardReader) -> None:
    """Take out the copies of frozen weights that peft saves beside an adapter of an embedding or an output head.

    Args:
        layers: Names of the adapter's layers.
        full: The tensors trained in full, by name, from which the copies are taken.
        kind: Name of the adapter type.
        folder: Of the adapter, for messages.
        reader: The base's files.

    Raises:
        ValueError: A copy is not the base's weight.
    """
    held = [name for name in layers if f"{name}.base_layer.weight" in full]
    rename = _rename(held, kind, folder, reader)
    for name, part in ((name, part) for name in held for part in ("weight", "bias")):
        key, copy = f"{rename(name)}.{part}", full.pop(f"{name}.base_layer.{part}", None)
        if copy is None:
            continue
        if key not in reader.matrices or not torch.equal(reader.read(key).to(copy.dtype), copy):
            raise ValueError(
                f"{folder} has a {part} of {name} that is not the base's: tokens were added, or it was trained on another base."
                f" Merge it with peft instead: {IN_PEFT}"
            )


def transposed_layers(
    shapes: Mapping[str, tuple[int, int]], field: bool, kind: str, folder: Path, reader: ShardReader
) -> set[str]:
    """Which layers the base stores as ``[in, out]`` (Conv1D): peft's ``fan_in_fan_out`` is that of the last layer alone.

    Args:
        shapes: (out, in) of each layer, of its adapter's tensors.
        field: ``fan_in_fan_out``, which square layers follow.
        kind: Name of the adapter type.
        folder: Of the adapter, for messages.
        reader: The base's files.

    Raises:
        ValueError: The base does not have the layers, or stores some either way, so that nothing tells how square ones are.
    """
    rename = _rename(shapes, kind, folder, reader)
    stored = {name: tuple(reader.matrices[f"{rename(name)}.weight"].shape) for name in shapes}
    # What fits neither way is refused by `resolve_names`.
    told = {n: stored[n] == (b, a) for n, (a, b) in shapes.items() if a != b and stored[n] in ((a, b), (b, a))}
    square = [name for name, (a, b) in shapes.items() if a == b]
    if square and len({*told.values(), field}) > 1:
        raise ValueError(
            f"{folder} has layers that {reader.folder} stores as [in, out] beside others as [out, in]. Its file does not say"
            f" which of them the square ones are: {few(square)}. Merge it with peft instead: {IN_PEFT}"
        )
    return {name for name in shapes if told.get(name, field)}


def base_weights(names: Iterable[str], kind: str, folder: Path, reader: ShardReader) -> Iterator[tuple[str, Tensor]]:
    """Yield each layer's weight as the base stores it, one at a time.

    Args:
        names: Of the layers.
        kind: Name of the adapter type.
        folder: Of the adapter, for messages.
        reader: The base's files.

    Raises:
        ValueError: The base does not have the layers.
    """
    found = list(names)
    rename = _rename(found, kind, folder, reader)
    for name in found:
        yield name, reader.read(f"{rename(name)}.weight")


def _rename(names: Iterable[str], kind: str, folder: Path, reader: ShardReader) -> Callable[[str], str]:
    wording = Wording(
        whose="the adapter's",
        owner=f"the {kind} of {folder}",
        expects="was trained on",
        missing=f"Give the base that it was trained on, or merge it with peft instead: {IN_PEFT}",
        ambiguous=f"Merge it with peft instead: {IN_PEFT}",
        mismatch="Give the base that it was trained on.",
        quantised=QUANTISED,
    )
    return match_names(dict.fromkeys(names), reader, reader.folder, wording)


def layer_options(ranks: Mapping[str, int], full: Collection[str]) -> dict[str, Any]:
    """The options that every method has, from the rank of each layer and the names of the tensors trained in full."""
    usual = max(ranks.values())
    return {
        "target_modules": list(ranks),
        "rank": usual,
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != usual},
        "also_train": sorted({name.rpartition(".")[0] for name in full}),
    }


def adapter_file(
    folder: Path,
    record: PeftRecord,
    options: AdapterConfig,
    modules: dict[str, AdapterModule],
    full: dict[str, Tensor],
) -> AdapterFile:
    """The folder as an adapter of ours, with the base that its record names."""
    return AdapterFile(
        folder=folder,
        options=options,
        base_model=record.base_model_name_or_path,
        revision=record.revision,
        modules=modules,
        also_train=full,
    )
