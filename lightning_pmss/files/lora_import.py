"""Read a LoRA of peft's format, ``W' = W + scaling * lora_B lora_A``, and choose the reader of other types."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor

from lightning_pmss.files.adapter_file import CONFIG_FILE, WEIGHTS_FILE, AdapterFile, AdapterModule, write_adapter
from lightning_pmss.files.hira_import import read_hira
from lightning_pmss.files.miss_import import read_miss
from lightning_pmss.files.model_folder import refuse_overlap
from lightning_pmss.files.naming import resolve_names
from lightning_pmss.files.peft_folder import (
    AGAIN,
    IN_PEFT,
    PREFIX,
    QUANTISED,
    PeftRecord,
    adapter_file,
    drop_copies,
    layer_options,
    read_config,
    read_weights,
    refuse_fields,
    sort_tensors,
    transposed_layers,
)
from lightning_pmss.layers.layout import Layout
from lightning_pmss.methods.lora import LoRAConfig, LoRAUpdate
from lightning_pmss.store import checked
from lightning_pmss.store.atomic import check_target
from lightning_pmss.store.kinds import ADAPTER
from lightning_pmss.store.records import Size, shown
from lightning_pmss.store.shards import ShardReader, few, open_shards

_EMBEDDING = "lora_embedding_A"
_ENDS = {"lora_A.weight": "A", "lora_B.weight": "B", _EMBEDDING: "A", "lora_embedding_B": "B"}
_IN_TRAINING = (
    "corda_config", "eva_config", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core",
    "qalora_group_size", "velora_config",
)  # fmt: skip
# With these starts W stays as it is. Others (pissa, olora, corda, loftq, lora_ga) take a part out of W, again at each load.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


class LoraRecord(PeftRecord):
    """The fields that a LoRA has beside."""

    peft_type: Literal["LORA"]
    r: Size
    lora_alpha: Annotated[float, Field(allow_inf_nan=False)]
    alpha_pattern: dict[str, float] | None = None
    rank_pattern: dict[str, int] | None = None
    init_lora_weights: bool | str | None = True
    use_rslora: bool = False
    bias: str = "none"
    fan_in_fan_out: bool = False


def import_files(
    input: str | os.PathLike[str],
    base: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    format: str = "peft",
    overwrite: bool = False,
) -> str:
    """Write an adapter folder of ours from a folder of peft: a LoRA, a MiSS, a HiRA, or a Bone of peft before 0.19.

    Args:
        input: Folder with peft's ``adapter_config.json`` and ``adapter_model.safetensors``.
        base: The base, folder of safetensors or one file; its names and shapes are compared with the LoRA's.
        output: Folder to write; appears only when it is complete.
        format: ``"peft"``.
        overwrite: Replace an earlier adapter.

    Returns:
        A one-line report.

    Raises:
        FileNotFoundError: A folder or file is missing.
        FileExistsError: See `atomic_folder`.
        ValueError: Another kind of adapter, a variant (DoRA, biases), damaged files, or layers that the base does not have.
    """
    if format != "peft":
        raise ValueError(f"format={format!r} is not known; choose peft.")
    source, base, target = (Path(path).expanduser() for path in (input, base, output))
    refuse_overlap(target, {"input": source, "base": base})
    check_target(target, ADAPTER, overwrite=overwrite)
    content = read_config(source)
    read = _reader_of(content, str(source / CONFIG_FILE))
    with open_shards(base) as reader:
        adapter = read(source, content, reader)
        rename = resolve_names(adapter, reader, base, IN_PEFT, QUANTISED)  # also checks the shapes
        if lost := [name for name in adapter.also_train if rename(name) not in reader.tensors]:
            raise ValueError(
                f"{source} has {few(lost)} trained in full, which {base} does not have under this name: the module was made for"
                " the training, such as a new head, or it is tied to another one, of which peft trains a copy. Merge it with"
                f" peft instead: {IN_PEFT}"
            )
    write_adapter(adapter, target, overwrite=overwrite, base=base if base.is_dir() else None)
    return f"{adapter.options.label()} of {source}: {len(adapter.modules)} layers, written to {target}"


def read_lora(folder: Path, content: Any, reader: ShardReader) -> AdapterFile:
    """Read and check a LoRA folder of peft.

    Args:
        folder: With both files.
        content: Of its config.
        reader: The base's files, with which peft's copies of embeddings are compared.

    Raises:
        ValueError: A variant (DoRA, biases, a start that changes W), or damaged files.
    """
    where = str(folder / CONFIG_FILE)
    record = checked(LoraRecord, content, where, AGAIN)
    _refuse_variants(record, where)
    tensors = read_weights(folder)
    pairs, full = sort_tensors(tensors, "a plain LoRA", _ENDS, ("lora_",), str(folder / WEIGHTS_FILE))
    embeddings = [name for name in pairs if f"{PREFIX}{name}.{_EMBEDDING}" in tensors]
    drop_copies(pairs, full, "LoRA", folder, reader)
    layouts = {n: _layout(pair, n in embeddings) for n, pair in pairs.items()}
    scales = {name: _scaling(record, name, len(pair["A"]), where) for name, pair in pairs.items()}
    modules = {n: _module(pair, scales[n], layouts[n], n, str(folder)) for n, pair in pairs.items()}
    linear = {n: module.shape for n, module in modules.items() if module.layout is Layout.LINEAR}
    for name in transposed_layers(linear, record.fan_in_fan_out, "LoRA", folder, reader):
        modules[name] = replace(modules[name], layout=Layout.CONV1D)
    common = layer_options({name: module.update.rank for name, module in modules.items()}, full)
    usual = common["rank"]
    first = next(name for name, module in modules.items() if module.update.rank == usual)
    options = LoRAConfig(
        **common,
        alpha=scales[first] * (math.sqrt(usual) if record.use_rslora else usual),
        rank_stabilized=record.use_rslora,
    )
    return adapter_file(folder, record, options, modules, full)


_READERS: Mapping[str, Callable[[Path, Any, ShardReader], AdapterFile]] = {
    "LORA": read_lora,
    "MISS": read_miss,
    "BONE": read_miss,
    "HIRA": read_hira,
}


def _reader_of(content: Any, where: str) -> Callable[[Path, Any, ShardReader], AdapterFile]:
    """The reader of the adapter type that a config says."""
    kind = content.get("peft_type") if isinstance(content, dict) else None
    if not isinstance(kind, str) or kind not in _READERS:
        raise ValueError(
            f"{where} has the peft_type {shown(kind)}; {', '.join(_READERS)} are read. Merge it with peft instead: {IN_PEFT}"
        )
    return _READERS[kind]


def _refuse_variants(record: LoraRecord, where: str) -> None:
    if record.bias != "none":
        raise ValueError(
            f"{where} has bias={record.bias}, which W + B A cannot express. Merge it with peft (merge_and_unload) instead."
        )
    if record.init_lora_weights not in _PLAIN_STARTS:
        raise ValueError(
            f"{where} has init_lora_weights={record.init_lora_weights!r}: peft takes a part out of W before it adds the LoRA."
            " Save it with path_initial_model_for_weight_conversion, or merge it with peft instead."
        )
    refuse_fields(record, "LoRA", where, _IN_TRAINING)


def _scaling(record: LoraRecord, name: str, rank: int, where: str) -> float:
    """Return peft's factor of a layer, ``alpha / r`` or ``alpha / sqrt(r)``; patterns are compared as text, never run."""
    alpha = record.lora_alpha
    for pattern, value in (record.alpha_pattern or {}).items():
        literal = re.sub(r"\\(.)", r"\1", pattern.removeprefix("^").removesuffix("$"))
        if not re.fullmatch(r"[\w.\-]+", literal):
            raise ValueError(f"{where}: alpha_pattern has {pattern!r}, not a plain name. Merge it with peft instead.")
        if name == literal or (not pattern.startswith("^") and name.endswith(f".{literal}")):
            alpha = value
            break
    return alpha / (math.sqrt(rank) if record.use_rslora else rank)


def _layout(pair: Mapping[str, Tensor], embedding: bool) -> Layout:
    """The kind of layer that a pair of factors is of."""
    if embedding:
        return Layout.EMBEDDING
    return Layout.CONVOLUTION if pair["A"].dim() > 2 else Layout.LINEAR


def _module(pair: dict[str, Tensor], scale: float, layout: Layout, name: str, where: str) -> AdapterModule:
    a, b = (pair[part].float() for part in ("A", "B"))
    flat = layout is Layout.CONVOLUTION and b.dim() == a.dim() and math.prod(b.shape[2:]) == 1
    a, b = (a.flatten(1), b.flatten(1)) if flat else (a, b)
    if a.dim() != 2 or b.dim() != 2:
        raise ValueError(f"{where}: {name} has factors that are neither matrices nor those of a convolution. {AGAIN}")
    shape = (b.shape[0], a.shape[1])
    update = {"A": a, "B": scale * b}
    if reason := LoRAUpdate.why_not(shape, update):
        raise ValueError(f"{where}: {name}.{reason}. {AGAIN}")
    return AdapterModule(shape, layout, {}, LoRAUpdate(**update).narrowed(shape))
