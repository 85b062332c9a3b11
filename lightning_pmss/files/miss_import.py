"""Read a MiSS of peft's format, or a Bone of peft before 0.19, as an adapter of ours: MiSS, or the column form of BAT."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict
from torch import Tensor

from lightning_pmss.files.adapter_file import CONFIG_FILE, WEIGHTS_FILE, AdapterFile, AdapterModule
from lightning_pmss.files.naming import Wording, match_names
from lightning_pmss.files.peft_folder import AGAIN, IN_PEFT, PREFIX, QUANTISED, read_weights
from lightning_pmss.layers.fingerprint import fingerprint
from lightning_pmss.methods.bat import BATConfig, BATUpdate
from lightning_pmss.methods.config import AdapterConfig
from lightning_pmss.methods.method import Update
from lightning_pmss.methods.miss import MiSSConfig, MiSSUpdate
from lightning_pmss.store import Record, checked
from lightning_pmss.store.shards import ShardReader, few

KINDS = ("MISS", "BONE")  # the same tensors under other names
_ENDS = (".miss_block", ".bone_block")


class MissRecord(Record):
    """Entries of peft's ``adapter_config.json``; the rest matters only in training, or shows in the tensors."""

    model_config = ConfigDict(extra="ignore")

    peft_type: Literal["MISS", "BONE"]
    base_model_name_or_path: str | None = None
    revision: str | None = None
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
        ValueError: Biases, damaged files, or layers that the base does not have.
    """
    where = str(folder / CONFIG_FILE)
    record = checked(MissRecord, content, where, AGAIN)
    if record.bias != "none":
        raise ValueError(f"{where} has bias={record.bias}, which MiSS here cannot express. Merge it with peft instead.")
    blocks, full = _sorted(read_weights(folder), str(folder / WEIGHTS_FILE))
    kind = "BAT" if record.init_weights == "bat" else "MiSS"
    wording = Wording(
        whose="the adapter's",
        owner=f"the {kind} of {folder}",
        expects="was trained on",
        missing=f"Give the base that it was trained on, or merge it with peft instead: {IN_PEFT}",
        ambiguous=f"Merge it with peft instead: {IN_PEFT}",
        mismatch="Give the base that it was trained on.",
        quantised=QUANTISED,
    )
    rename = match_names(dict.fromkeys(blocks), reader, reader.folder, wording)
    modules = {}
    for name, block in blocks.items():
        weight = reader.read(f"{rename(name)}.weight")
        update = _update(block, kind == "BAT", (weight.shape[0], weight.shape[1]), f"{folder / WEIGHTS_FILE}: {name}")
        prints = fingerprint(*update.read(weight))
        modules[name] = AdapterModule((weight.shape[0], weight.shape[1]), "linear", prints, update)
    return AdapterFile(
        folder=folder,
        options=_options(record, modules, full),
        base_model=record.base_model_name_or_path,
        revision=record.revision,
        modules=modules,
        also_train=full,
    )


def _sorted(tensors: dict[str, Tensor], where: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Sort peft's tensors into those of the layers and those trained in full, by name."""
    blocks: dict[str, Tensor] = {}
    full: dict[str, Tensor] = {}
    for key, value in tensors.items():
        name = key.removeprefix(PREFIX)
        if end := next((end for end in _ENDS if name.endswith(end)), None):
            blocks[name.removesuffix(end)] = value
        elif any(part in name for part in ("miss_", "bone_")) or not key.startswith(PREFIX):
            raise ValueError(f"{where}: {key} is not a tensor of MiSS. Merge it with peft instead.")
        else:
            full[name] = value
    if not blocks:
        raise ValueError(f"{where} has no layers of MiSS. {AGAIN}")
    return blocks, full


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
    ranks = {name: module.update.rank for name, module in modules.items()}
    usual = max(ranks.values())
    common: dict[str, Any] = {
        "target_modules": list(modules),
        "rank": usual,
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != usual},
        "also_train": sorted({name.rpartition(".")[0] for name in full}),
    }
    if record.init_weights == "bat":
        return BATConfig(**common)
    columns = {int(module.update.tensors()["D"].shape[1]) for module in modules.values()}
    mini = record.init_weights == "mini"
    if mini and len(columns) > 1:
        raise ValueError(f"MiSS of one mini_r has {few(sorted(map(str, columns)))} columns in its layers. {AGAIN}")
    return MiSSConfig(**common, mini_rank=columns.pop() if mini else None, dropout=record.miss_dropout)
