"""Write the adapter of a checkpoint, as `fit` would have written it at that step, without the training program.

A checkpoint contains V, and ``U = left V right`` with factors from the base's selected rows and columns. The base is streamed,
one matrix at a time. The result equals `fit`'s bit for bit if the factors do: on the same machine with the same number of
threads, and without a skeleton file of another machine. DeepSpeed with ``bf16`` computes U from bfloat16 copies; here the
float32 masters are used.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lightning_pmss.checkpoints.names import Found, FoundLayer, described, from_keys
from lightning_pmss.checkpoints.reading import DAMAGED, read_checkpoint
from lightning_pmss.checkpoints.record import METADATA, CheckpointRecord, check_layer, options_of, read_record
from lightning_pmss.files.adapter_file import AdapterFile, AdapterModule, write_adapter
from lightning_pmss.files.fresh import rows_to_keep
from lightning_pmss.files.merged import merge_files
from lightning_pmss.files.model_folder import FileMergeReport, refuse_overlap
from lightning_pmss.files.naming import Wording, match_names, refuse_misfits
from lightning_pmss.layers.experts import without_stacks
from lightning_pmss.layers.fingerprint import same_base
from lightning_pmss.layers.layout import Layout
from lightning_pmss.layers.parts import clean_name
from lightning_pmss.layers.products import core_dtype
from lightning_pmss.methods import method_of
from lightning_pmss.methods.config import AdapterConfig
from lightning_pmss.store import not_finite, refuse_odd_type
from lightning_pmss.store.atomic import check_target
from lightning_pmss.store.kinds import ADAPTER, MERGED, FolderKind
from lightning_pmss.store.shards import ShardReader, few, open_shards

_DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_GO_ON = "resume the run with it as ckpt_path and max_steps at its step: fit then writes the adapter"


@dataclass(frozen=True)
class ExtractReport:
    """Report of `extract_files`; ``print`` shows it as one line.

    Attributes:
        checkpoint: Path of the checkpoint.
        output: Path of the adapter folder.
        layers: Number of converted layers.
        step: Number of optimizer steps at the checkpoint; None if it does not say.
    """

    checkpoint: str
    output: str
    layers: int
    step: int | None

    def __str__(self) -> str:
        at = "" if self.step is None else f" at step {self.step}"
        return f"adapter of {self.checkpoint}{at}: {self.layers} layers, written to {self.output}"


def extract_files(
    ckpt: str | os.PathLike[str],
    base: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    progress: bool = True,
) -> ExtractReport:
    """Write the adapter folder of a checkpoint.

    Args:
        ckpt: Checkpoint of a run with `PMSSCallback`: file, or folder of FSDP1, FSDP2, ZeRO-2 or ZeRO-3.
        base: Base of the run: folder with safetensors weights, or a safetensors file with a state dict.
        output: Folder to write; appears only when it is complete.
        overwrite: Replace an earlier adapter.
        progress: Show a progress bar.

    Raises:
        FileNotFoundError: Checkpoint or base is missing.
        FileExistsError: See `atomic_folder`.
        PermissionError: A file is not readable.
        ValueError: The checkpoint is damaged or has no adapter, the base is another one or quantised, or the output is equal
            to, inside or around base or checkpoint.
    """
    ckpt, base, output = (Path(path).expanduser() for path in (ckpt, base, output))
    adapter, step = _adapter(ckpt, base, output, ADAPTER, overwrite=overwrite, progress=progress)
    facts: dict[str, Any] = {"checkpoint": ckpt.name}
    if step is not None:
        facts["optimizer steps"] = step
    write_adapter(adapter, output, overwrite=overwrite, run={"Training": facts}, base=base if base.is_dir() else None)
    return ExtractReport(str(ckpt), str(output), len(adapter.modules), step)


def merge_checkpoint(
    ckpt: str | os.PathLike[str],
    base: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    progress: bool = True,
    **options: Any,
) -> FileMergeReport:
    """Merge the adapter of a checkpoint into its base on disk, as `extract_files` and `merge_files` would.

    Args:
        ckpt: See `extract_files`.
        base: See `extract_files`.
        output: See `merge_files`.
        overwrite: See `merge_files`.
        progress: Show progress bars.
        **options: Options of `merge_files`: ``dtype``, ``max_shard_size``.

    Raises:
        OSError, ValueError: See `extract_files` and `merge_files`.
    """
    ckpt, base, output = (Path(path).expanduser() for path in (ckpt, base, output))
    adapter, _ = _adapter(ckpt, base, output, MERGED, overwrite=overwrite, progress=progress)
    return merge_files(base, adapter, output, overwrite=overwrite, progress=progress, **options)


@torch.no_grad()
def _adapter(
    ckpt: Path, base: Path, output: Path, kind: FolderKind, *, overwrite: bool, progress: bool
) -> tuple[AdapterFile, int | None]:
    """Check the output, then read the checkpoint's adapter and its number of optimizer steps."""
    refuse_overlap(output, {"base": base, "checkpoint": ckpt})
    check_target(output, kind, overwrite=overwrite)
    where = f"the checkpoint {ckpt}"
    content = read_checkpoint(ckpt)
    for key, value in content["state_dict"].items():
        refuse_odd_type(value, key, where, DAMAGED)
    state: dict[str, Tensor] = {clean_name(key): value for key, value in content["state_dict"].items()}
    state = without_stacks(state)
    record = read_record(content.get(METADATA), where)
    options = options_of(record, where)
    with open_shards(base) as reader:
        if isinstance(record, CheckpointRecord):
            found = described(record, options, state, where)
        else:
            found = from_keys(record.prints, options, state, where, str(base))
        rename = _names(found, reader, base, ckpt)
        modules, wrong = {}, []
        for name, layer in tqdm(found.layers.items(), desc="extracting", unit="layer", disable=not progress):
            own = found.fresh.get(f"{name}.weight")
            weight = reader.read(f"{rename(name)}.weight") if own is None else state[own.key]
            module = _module(layer, weight, state, options, name, where)
            if module is None:
                wrong.append(name)
            else:
                modules[name] = module
        fresh = {}
        for name, entry in found.fresh.items():
            keys = [rename(other) for other in (name, *entry.tied)]
            stored = next((reader.read(key) for key in keys if key in reader.tensors), None)
            fresh[name] = rows_to_keep(state[entry.key], entry.start, stored)
    adapter = AdapterFile(
        folder=ckpt,
        options=options,
        base_model=found.base_model,
        revision=found.revision,
        modules=modules,
        model_class=found.model_class,
        also_train={name: state[full.key].clone() for name, full in found.also_train.items()},
        tied={name: full.tied for name, full in (found.also_train | found.fresh).items()},
        quantisation=found.quantisation,
        quantisation_settings=found.quantisation_settings,
        root=found.root,
        left_out=found.left_out,
        fresh=fresh,
        settings=found.settings,
    )
    refuse_misfits(adapter, reader, rename)
    if not wrong and (broken := not_finite(_numbers(modules) | adapter.also_train)):
        raise ValueError(f"{where}: {few(broken)} would be NaN or infinite. {DAMAGED}")
    if wrong:
        raise ValueError(adapter.wrong_base(wrong, str(base)))
    return adapter, content.get("global_step")


def _numbers(modules: Mapping[str, AdapterModule]) -> dict[str, Tensor]:
    return {f"{name}.{part}": value for name, m in modules.items() for part, value in m.update.numbers().items()}


def _module(
    layer: FoundLayer, stored: Tensor, state: Mapping[str, Tensor], options: AdapterConfig, name: str, where: str
) -> AdapterModule | None:
    """One layer of the adapter; None if it was trained on another weight than the base's."""
    layouts = (Layout.LINEAR, Layout.CONV1D) if layer.layout is None else (layer.layout,)
    method = method_of(options)
    for number, layout in enumerate(layouts):
        weight = layout.canonical(stored)
        shape = (weight.shape[0], weight.shape[1])
        try:
            found = check_layer(state, shape, method, layer.key, where, layer.rank)
        except ValueError:
            if number < len(layouts) - 1:  # format 1 does not contain the layout: the indices may fit the other one
                continue
            raise
        cls = method.update_class
        if cls.bound_to_base and not same_base(layer.fingerprint, *cls.reads(weight, found.indices)):
            continue
        # The dtype from which the run derived frozen tensors; the trip through the file's dtype is exact.
        weight = weight.to(_DTYPES[layer.frame_dtype]) if layer.frame_dtype is not None else weight
        dtype = core_dtype(weight.dtype)
        derived = method.derive(weight, found.rank, name, found.indices)
        derived = {part: t.to(dtype) if t.is_floating_point() else t for part, t in derived.items()}
        trained = {part: t.to(dtype) for part, t in found.trained.items()}
        update = method.update_of(trained | derived, options.scale_of(found.rank, shape))
        return AdapterModule(shape, layout, layer.fingerprint, update.stored().cloned())
    return None


def _names(found: Found, reader: ShardReader, base: Path, ckpt: Path) -> Callable[[str], str]:
    if found.quantisation:
        raise ValueError(
            f"{ckpt} was trained on quantised weights ({few(found.quantisation)}), not on those on disk. Load it in"
            " Python: MODULE.load_from_checkpoint(CKPT), then save_adapter(module, ADAPTER_DIR)."
        )
    stored = {
        name: None if layer.shape is None else (layer.shape, layer.layout or Layout.LINEAR)
        for name, layer in found.layers.items()
        if f"{name}.weight" not in found.fresh
    }
    wording = Wording(
        whose="the checkpoint's",
        owner=f"the checkpoint {ckpt}",
        expects="was trained on",
        missing=f"Give the base that the run started from; if its file has other names for these layers, {_GO_ON}.",
        ambiguous=f"So {_GO_ON}.",
        mismatch="Give the base that the run started from.",
        quantised=f"a quantised form, of which no rows and columns can be read. Give the unquantised base, or {_GO_ON}.",
    )
    return match_names(stored, reader, base, wording)
