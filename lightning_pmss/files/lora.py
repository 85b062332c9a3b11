"""Export an adapter to peft's format: as a LoRA, or as peft's own type of the method.

A LoRA is exact if the update is a product of thin matrices. PMSS's ``W' = W + C (s U) R`` is one, with ``lora_A = R`` and
``lora_B = C (s U)``. So peft, vLLM and every other reader of LoRA compute W' from the untouched base. The file is larger than
PMSS's own: ``r (in + out)`` numbers per layer instead of ``r^2``. Cutting singular values gives a smaller rank, and the report
has the error of each layer. `lightning_pmss.files.peft_form` has the types.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lightning_pmss.files.adapter_file import WEIGHTS_FILE, read_adapter
from lightning_pmss.files.lora_config import CONFIG_FILE, peft_config, write_peft_config
from lightning_pmss.files.lora_report import ExportedLayer, LoraReport, write_card, write_report
from lightning_pmss.files.lora_source import (
    Source,
    file_source,
    model_source,
    refuse_fresh_layers,
    refuse_parameters,
)
from lightning_pmss.files.model_folder import refuse_overlap
from lightning_pmss.files.naming import parse_dtype
from lightning_pmss.files.peft_folder import PREFIX
from lightning_pmss.files.peft_form import Chosen, LoraForm, PeftForm, choose_form
from lightning_pmss.files.vllm_form import VllmForm
from lightning_pmss.store import not_finite
from lightning_pmss.store.atomic import atomic_folder, check_target
from lightning_pmss.store.kinds import LORA
from lightning_pmss.store.shards import ShardWriter, TensorInfo, few, open_shards

FORMATS = ("peft", "vllm")


@torch.no_grad()
def export_lora(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    rank: int | None = None,
    dtype: str | torch.dtype | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> LoraReport:
    """Write the adapter of a converted model as a LoRA that peft loads onto the untouched base.

    The model is not changed, and may be merged or not: the factors come from the pristine weights. `export_peft` writes peft's
    own type of the method.

    Args:
        model: Converted by `convert`, the callback or `load_adapter`; not sharded.
        folder: Written whole or not at all: ``adapter_model.safetensors``, ``adapter_config.json``, a model card, and
            ``export_report.json``.
        rank: Cut layers of a larger rank to this one, by singular values; None: exact. Updates without thin factors (BAT) need
            one.
        dtype: Dtype of the factors (``"bfloat16"``, ...); None: float32, float64 for a float64 base.
        overwrite: Replace an earlier export.
        progress: Show a progress bar.

    Returns:
        A report to ``print``.

    Raises:
        FileExistsError: See `atomic_folder`.
        ValueError: No converted layer, a sharded model, NaN or infinite values, a layer outside of the Hugging Face model,
            or an invalid rank or dtype.
    """
    return export_peft(model, folder, native=False, rank=rank, dtype=dtype, overwrite=overwrite, progress=progress)


@torch.no_grad()
def export_peft(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    native: bool | None = None,
    rank: int | None = None,
    dtype: str | torch.dtype | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> LoraReport:
    """Write the adapter of a converted model as peft's own type of its method, or as a LoRA.

    Args:
        model: See `export_lora`.
        folder: See `export_lora`.
        native: True: peft's own type (LoRA, MiSS, BAT as a form of MiSS, HiRA), with the trained numbers as they are. False: a
            LoRA. None: the first where peft can express the adapter in it, else the second; a LoRA if there is a ``rank``.
        rank: See `export_lora`; for a LoRA only.
        dtype: See `export_lora`.
        overwrite: See `export_lora`.
        progress: See `export_lora`.

    Returns:
        A report to ``print``.

    Raises:
        FileExistsError: See `atomic_folder`.
        ValueError: As `export_lora`; or ``native=True``, and peft has no such type or cannot express the adapter in it.
    """
    target, wanted = _checked(folder, rank, overwrite), parse_dtype(dtype, "float32")
    source = model_source(model)
    refuse_parameters(source)
    return _write(choose_form(source, native, rank), target, wanted, overwrite, progress, None)


@torch.no_grad()
def export_files(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    format: str = "peft",
    native: bool | None = None,
    rank: int | None = None,
    dtype: str | torch.dtype | None = None,
    overwrite: bool = False,
    progress: bool = True,
    announce: Callable[[str], object] | None = None,
) -> LoraReport:
    """Export an adapter folder with its base on disk, layer by layer, without building the model.

    Args:
        base: Folder of the base's safetensors; only the adapter's layers are read.
        adapter: Folder written by `save_adapter`.
        output: Folder to write, see `export_lora`.
        format: ``"peft"``, or ``"vllm"``: a LoRA, in which each expert's gate, up and down have names of their own.
        native: See `export_peft`.
        rank: See `export_lora`.
        dtype: See `export_lora`.
        overwrite: See `export_lora`.
        progress: See `export_lora`.
        announce: Called before anything is written, with a line on the size and the ranks.

    Raises:
        FileNotFoundError: Base or adapter or one of their files is missing.
        FileExistsError: See `atomic_folder`.
        ValueError: Another base than the adapter's (also its merged form), a module not found in it, an unknown format, NaN
            or infinite values, an output equal to, inside or around base or adapter, unreadable files.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is not known; choose {' or '.join(FORMATS)}.")
    if format == "vllm" and native:
        raise ValueError("vLLM reads LoRA only: leave --as native out, or type --format peft.")
    base, adapter, output = (Path(path).expanduser() for path in (base, adapter, output))
    refuse_overlap(output, {"base": base, "adapter": adapter})
    target = _checked(output, rank, overwrite)
    trained = read_adapter(adapter)
    wanted = parse_dtype(dtype, "float32")
    with open_shards(base) as reader:
        refuse_fresh_layers(trained.fresh, trained.modules)
        source = file_source(trained, reader)
        refuse_parameters(source)
        chosen = choose_form(source, native, rank) if format == "peft" else Chosen(VllmForm(source, rank))
        return _write(chosen, target, wanted, overwrite, progress, announce)


def _write(
    chosen: Chosen,
    target: Path,
    dtype: torch.dtype | None,
    overwrite: bool,
    progress: bool,
    announce: Callable[[str], object] | None,
) -> LoraReport:
    """Plan the file, announce it, and write the folder."""
    form, source = chosen.form, chosen.form.source
    ranks = {name: form.rank(name) for name in form.names()}
    dtype = dtype or (torch.float64 if source.double else torch.float32)
    extra = _with_tied(source)
    config = peft_config(
        form.modules(),
        form.fields(ranks),
        modules=source.modules,
        modules_to_save=_owners(extra),
        base_model=source.base_model,
        revision=source.revision,
        model_class=source.model_class,
    )
    infos = [
        TensorInfo(f"{PREFIX}{form.place(name)}.{end}", dtype, shape, name)
        for name in form.names()
        for end, shape in form.shapes(name).items()
    ]
    infos += [TensorInfo(f"{PREFIX}{key}", value.dtype, tuple(value.shape)) for key, value in extra.items()]
    cut = isinstance(form, LoraForm)
    report = LoraReport(
        output=str(target),
        method=source.options.label(),
        about=source.options.card(),
        layers=[
            ExportedLayer(name, layer.shape, layer.rank if cut else ranks[name], ranks[name])
            for name, layer in ((name, form.layer(name)) for name in form.names())
        ],
        modules_to_save=config["modules_to_save"] or [],
        dtype=str(dtype).removeprefix("torch."),
        bytes=sum(info.bytes for info in infos),
        base_model=source.base_model,
        revision=source.revision,
        model_class=source.model_class,
        form=form.name,
        served=form.served,
        for_peft=form.for_peft,
        merge_only=bool(source.applied()),
        instead=chosen.instead,
    )
    form.part(form.names()[0])  # refuses another base before anything is announced or written
    if announce is not None:
        announce(report.announcement())
    with atomic_folder(target, LORA, overwrite=overwrite) as folder:
        bar = tqdm(total=report.bytes, unit="B", unit_scale=True, desc="exporting", disable=not progress)
        with bar, ShardWriter(folder / WEIGHTS_FILE, infos) as writer:
            sizes = {info.key: info.bytes for info in infos}
            for key, value in _tensors(form, writer.plan, extra, report.errors):
                writer.write(key, value)
                bar.update(sizes[key])
        write_peft_config(config, folder / CONFIG_FILE)
        write_card(folder, report)
        write_report(folder, report)
    return report


def _tensors(
    form: PeftForm, plan: list[TensorInfo], extra: Mapping[str, Tensor], errors: dict[str, float]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in the order of the file: those of a layer together, so one layer is in memory at a time."""
    held: dict[str, Tensor] = {}
    for info in plan:
        name = info.file
        if not name:
            yield info.key, extra[info.key.removeprefix(PREFIX)]
            continue
        if not held:
            tensors, lost = form.part(name)
            if lost is not None:
                errors[name] = lost
            held = {f"{PREFIX}{form.place(name)}.{end}": t.to(info.dtype) for end, t in tensors.items()}
            if broken := not_finite(held):
                raise ValueError(
                    f"{few(broken)}: NaN or infinite values in {info.dtype}; nothing is written. The run diverged, or"
                    " the update is too large for this dtype: leave it out for float32."
                )
        yield info.key, held.pop(info.key)


def _with_tied(source: Source) -> dict[str, Tensor]:
    """Return the tensors trained in full under all their names: peft copies and unties them, and each copy needs values."""
    found = dict(source.also_train)
    for name, others in source.tied.items():
        found |= dict.fromkeys(others, source.also_train[name])
    return found


def _owners(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the outermost modules that contain these tensors."""
    names = sorted({name.rpartition(".")[0] for name in tensors})
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


def _checked(folder: str | os.PathLike[str], rank: int | None, overwrite: bool) -> Path:
    target = Path(folder).expanduser()
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank={rank!r} is not a rank; type a whole number of at least 1, or leave it out: exact.")
    check_target(target, LORA, overwrite=overwrite)
    return target
