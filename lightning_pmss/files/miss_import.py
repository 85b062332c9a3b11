"""Read a MiSS of peft's format, or a Bone of peft before 0.19, as an adapter of ours: MiSS, or the column form of BAT."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from lightning_pmss.files.adapter_file import CONFIG_FILE, WEIGHTS_FILE, AdapterFile, AdapterModule
from lightning_pmss.files.peft_folder import (
    AGAIN,
    PeftRecord,
    adapter_file,
    base_weights,
    drop_copies,
    layer_options,
    read_weights,
    refuse_fields,
    sort_tensors,
)
from lightning_pmss.layers.fingerprint import fingerprint
from lightning_pmss.layers.layout import Layout
from lightning_pmss.methods.bat import BATConfig, BATUpdate
from lightning_pmss.methods.config import AdapterConfig
from lightning_pmss.methods.method import Update
from lightning_pmss.methods.miss import MiSSConfig, MiSSUpdate
from lightning_pmss.store import checked
from lightning_pmss.store.shards import ShardReader, few

_ENDS = {"miss_block": "block", "bone_block": "block"}  # the same tensors under other names


class MissRecord(PeftRecord):
    """The fields that MiSS has beside."""

    peft_type: Literal["MISS", "BONE"]
    r: int = 0  # shows in the tensors, as mini_r
    mini_r: int = 0
    miss_dropout: float = 0.0
    init_weights: bool | Literal["bat", "mini"] = True
    bias: str = "none"


def read_miss(folder: Path, content: Any, reader: ShardReader) -> AdapterFile:
    """Read and check a folder of MiSS or Bone. Its tensors do not show the shape of W, which is therefore the base's.

    Args:
        folder: With both files.
        content: Of its config.
        reader: The base's files.

    Raises:
        ValueError: Biases or other variants, damaged files, or layers that the base does not have.
    """
    where = str(folder / CONFIG_FILE)
    record = checked(MissRecord, content, where, AGAIN)
    kind = "BAT" if record.init_weights == "bat" else "MiSS"
    if record.bias != "none":
        raise ValueError(
            f"{where} has bias={record.bias}, which {kind} here cannot express. Merge it with peft instead."
        )
    refuse_fields(record, kind, where)
    file = str(folder / WEIGHTS_FILE)
    blocks, full = sort_tensors(read_weights(folder), "MiSS", _ENDS, ("miss_", "bone_"), file)
    drop_copies(blocks, full, kind, folder, reader)
    modules = {}
    for name, weight in base_weights(blocks, kind, folder, reader):
        shape = weight.shape[0], weight.shape[1]
        update = _update(blocks[name]["block"], kind == "BAT", shape, f"{file}: {name}")
        modules[name] = AdapterModule(shape, Layout.LINEAR, fingerprint(*update.read(weight)), update)
    return adapter_file(folder, record, _options(record, modules, full), modules, full)


def _update(block: Tensor, bat: bool, shape: tuple[int, int], where: str) -> Update:
    kind: type[Update] = BATUpdate if bat else MiSSUpdate
    if block.dim() != (3 if bat else 2) or bat and block.shape[1] != block.shape[2]:
        wanted = "blocks of r x r" if bat else "a matrix"
        raise ValueError(
            f"{where} is {list(block.shape)}, not {wanted}, as init_weights in {CONFIG_FILE} says. {AGAIN}"
        )
    (part,) = kind.names()
    tensors = {part: block.float().flatten(0, 1) if bat else block.float()}
    if reason := kind.why_not(shape, tensors):
        raise ValueError(f"{where}.{reason}. {AGAIN}")
    return kind(**tensors)


def _options(record: MissRecord, modules: dict[str, AdapterModule], full: dict[str, Tensor]) -> AdapterConfig:
    common = layer_options({name: module.update.rank for name, module in modules.items()}, full)
    if record.init_weights == "bat":
        return BATConfig(**common)
    columns = {int(module.update.tensors()["D"].shape[1]) for module in modules.values()}
    mini = record.init_weights == "mini"
    if mini and len(columns) > 1:
        raise ValueError(f"MiSS of one mini_r has {few(sorted(map(str, columns)))} columns in its layers. {AGAIN}")
    return MiSSConfig(**common, mini_rank=columns.pop() if mini else None, dropout=record.miss_dropout)
