"""Read a LoRA of peft's format as an adapter of ours: ``W' = W + scaling * lora_B lora_A``."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from torch import Tensor

from lightning_pmss.files.adapter_file import CONFIG_FILE, WEIGHTS_FILE, AdapterFile, AdapterModule, write_adapter
from lightning_pmss.files.miss_import import KINDS, read_miss
from lightning_pmss.files.model_folder import refuse_overlap
from lightning_pmss.files.naming import resolve_names
from lightning_pmss.files.peft_folder import AGAIN, IN_PEFT, PREFIX, QUANTISED, read_config, read_weights
from lightning_pmss.methods.lora import LoRAConfig, LoRAUpdate
from lightning_pmss.store import Record, checked
from lightning_pmss.store.atomic import check_target
from lightning_pmss.store.kinds import ADAPTER
from lightning_pmss.store.records import Size
from lightning_pmss.store.shards import few, open_shards

_ENDS = {"lora_A.weight": "A", "lora_B.weight": "B"}


class PeftRecord(Record):
    """Entries of peft's ``adapter_config.json``; the rest matters only in training, or `_refuse_variants` refuses it."""

    model_config = ConfigDict(extra="ignore")

    peft_type: Literal["LORA"]
    base_model_name_or_path: str | None = None
    revision: str | None = None
    r: Size
    lora_alpha: Annotated[float, Field(allow_inf_nan=False)]
    alpha_pattern: dict[str, float] | None = None
    rank_pattern: dict[str, int] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
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
    """Write an adapter folder of ours from a folder of peft: a LoRA, a MiSS, or a Bone of peft before 0.19.

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
    miss = isinstance(content, dict) and content.get("peft_type") in KINDS
    lora = None if miss else read_peft(source)
    with open_shards(base) as reader:
        adapter = read_miss(source, content, reader) if lora is None else lora
        rename = resolve_names(adapter, reader, base, IN_PEFT, QUANTISED)  # also checks the shapes
        if lost := [name for name in adapter.also_train if rename(name) not in reader.tensors]:
            raise ValueError(
                f"{source} has {few(lost)} trained in full, which {base} does not have under this name: it ties it to another"
                " tensor, of which peft trains a copy. Merge it with peft instead."
            )
    write_adapter(adapter, target, overwrite=overwrite, base=base if base.is_dir() else None)
    return f"{adapter.options.label()} of {source}: {len(adapter.modules)} layers, written to {target}"


def read_peft(folder: str | os.PathLike[str]) -> AdapterFile:
    """Read and check a LoRA folder of peft; raises as `import_files`."""
    folder = Path(folder).expanduser()
    content = read_config(folder)
    where = str(folder / CONFIG_FILE)
    record = checked(PeftRecord, content, where, AGAIN)
    _refuse_variants(record, content, where)
    pairs, full = _sorted(read_weights(folder), str(folder / WEIGHTS_FILE))
    scales = {name: _scaling(record, name, len(pair["A"]), where) for name, pair in pairs.items()}
    modules = {n: _module(pair, scales[n], record.fan_in_fan_out, n, str(folder)) for n, pair in pairs.items()}
    ranks = {name: module.update.rank for name, module in modules.items()}
    usual = max(ranks.values())
    first = next(name for name, rank in ranks.items() if rank == usual)
    options = LoRAConfig(
        target_modules=list(modules),
        rank=usual,
        rank_pattern={name: rank for name, rank in ranks.items() if rank != usual},
        alpha=scales[first] * (math.sqrt(usual) if record.use_rslora else usual),
        rank_stabilized=record.use_rslora,
        also_train=sorted({name.rpartition(".")[0] for name in full}),
    )
    return AdapterFile(
        folder=folder,
        options=options,
        base_model=record.base_model_name_or_path,
        revision=record.revision,
        modules=modules,
        also_train=full,
    )


def _refuse_variants(record: PeftRecord, content: Any, where: str) -> None:
    found = [name for name in ("use_dora", "lora_bias") if getattr(record, name)]
    found += [f"bias={record.bias}"] if record.bias != "none" else []
    others = ("layer_replication", "trainable_token_indices", "target_parameters", "alora_invocation_tokens")
    found += [name for name in others if content.get(name)]
    if found:
        raise ValueError(
            f"{where} has {few(found)}, which W + B A cannot express. Merge it with peft (merge_and_unload) instead."
        )


def _sorted(tensors: dict[str, Tensor], where: str) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Sort peft's tensors into pairs by layer, and tensors trained in full by name."""
    pairs: dict[str, dict[str, Tensor]] = {}
    full: dict[str, Tensor] = {}
    for key, value in tensors.items():
        name = key.removeprefix(PREFIX)
        end = next((end for end in _ENDS if name.endswith(f".{end}")), None)
        if end is not None:
            pairs.setdefault(name.removesuffix(f".{end}"), {})[_ENDS[end]] = value
        elif "lora_" in name or not key.startswith(PREFIX):
            raise ValueError(f"{where}: {key} is not a tensor of a plain LoRA. Merge it with peft instead.")
        else:
            full[name] = value
    if half := [name for name, pair in pairs.items() if len(pair) < 2]:
        raise ValueError(f"{where} lacks one of the two factors of {few(half)}. {AGAIN}")
    if not pairs:
        raise ValueError(f"{where} has no LoRA layers. {AGAIN}")
    return pairs, full


def _scaling(record: PeftRecord, name: str, rank: int, where: str) -> float:
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


def _module(pair: dict[str, Tensor], scale: float, transposed: bool, name: str, where: str) -> AdapterModule:
    a, b = (pair[part].float() for part in ("A", "B"))
    if a.dim() != 2 or b.dim() != 2:
        raise ValueError(f"{where}: {name} has factors that are no matrices (an embedding or a convolution). {AGAIN}")
    shape = (b.shape[0], a.shape[1])
    update = {"A": a, "B": scale * b}
    if reason := LoRAUpdate.why_not(shape, update):
        raise ValueError(f"{where}: {name}.{reason}. {AGAIN}")
    return AdapterModule(shape, "conv1d" if transposed else "linear", {}, LoRAUpdate(**update))
