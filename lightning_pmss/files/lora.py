"""Export an adapter as a LoRA of peft's format, exactly if the update is a product of thin matrices.

PMSS's ``W' = W + C (s U) R`` is one, with ``lora_A = R`` and ``lora_B = C (s U)``. So peft, vLLM and every other reader of LoRA
compute W' from the untouched base. The file is larger than PMSS's own: ``r (in + out)`` numbers per layer instead of ``r^2``.
Cutting singular values gives a smaller rank, and the report has the error of each layer.
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
from lightning_pmss.files.lora_source import Source, file_source, model_source, refuse_fresh_layers
from lightning_pmss.files.model_folder import refuse_overlap
from lightning_pmss.files.naming import parse_dtype
from lightning_pmss.methods.method import Factors
from lightning_pmss.store import not_finite
from lightning_pmss.store.atomic import atomic_folder, check_target
from lightning_pmss.store.kinds import LORA
from lightning_pmss.store.shards import ShardWriter, TensorInfo, few, open_shards

FORMATS = ("peft",)
_PREFIX = "base_model.model."  # of peft's keys


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

    The model is not changed, and may be merged or not: the factors come from the pristine weights.

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
    target = _checked(folder, rank, overwrite)
    return _write(
        model_source(model, cut=rank is not None),
        target,
        rank,
        parse_dtype(dtype, "float32"),
        overwrite,
        progress,
        None,
    )


@torch.no_grad()
def export_files(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    format: str = "peft",
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
        format: ``"peft"``.
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
    base, adapter, output = (Path(path).expanduser() for path in (base, adapter, output))
    refuse_overlap(output, {"base": base, "adapter": adapter})
    target = _checked(output, rank, overwrite)
    trained = read_adapter(adapter)
    wanted = parse_dtype(dtype, "float32")
    with open_shards(base) as reader:
        refuse_fresh_layers(trained.fresh, trained.modules)
        return _write(
            file_source(trained, reader, cut=rank is not None), target, rank, wanted, overwrite, progress, announce
        )


def lora_pair(factors: Factors, rank: int | None = None) -> tuple[Tensor, Tensor, float | None]:
    """Return ``lora_A [k, in]`` and ``lora_B [out, k]``, whose product ``lora_B @ lora_A`` is the update.

    Args:
        factors: Factors of the update, float64.
        rank: Largest k. If it is smaller than the factors' rank, the result is the best approximation (Eckart and Young), with
            the square root of the singular values in each factor.

    Returns:
        Both factors in float64, and the share of the update's Frobenius norm that was cut off; None if nothing was.
    """
    a, b = factors
    if rank is None or rank >= len(a):
        return a, b, None
    q_b, t_b = torch.linalg.qr(b)
    q_a, t_a = torch.linalg.qr(a.T)
    left, singular, right = torch.linalg.svd(t_b @ t_a.T)
    root = singular[:rank].sqrt()
    whole, cut = float(torch.linalg.vector_norm(singular)), float(torch.linalg.vector_norm(singular[rank:]))
    error = cut / whole if whole > 0 else 0.0
    return root[:, None] * (right[:rank] @ q_a.T), (q_b @ left[:, :rank]) * root, error


def _write(
    source: Source,
    target: Path,
    rank: int | None,
    dtype: torch.dtype | None,
    overwrite: bool,
    progress: bool,
    announce: Callable[[str], object] | None,
) -> LoraReport:
    """Plan the file, announce it, and write the folder."""
    ranks = {name: min(layer.rank, rank or layer.rank) for name, layer in source.layers.items()}
    dtype = dtype or (torch.float64 if source.double else torch.float32)
    extra = _with_tied(source)
    config = peft_config(
        ranks,
        modules=source.modules,
        modules_to_save=_owners(extra),
        transposed=any(layer.transposed for layer in source.layers.values()),
        base_model=source.base_model,
        revision=source.revision,
        model_class=source.model_class,
    )
    infos = [
        TensorInfo(f"{_PREFIX}{name}.lora_{side}.weight", dtype, shape)
        for name, layer in source.layers.items()
        for side, shape in (("A", (ranks[name], layer.shape[1])), ("B", (layer.shape[0], ranks[name])))
    ]
    infos += [TensorInfo(f"{_PREFIX}{key}", value.dtype, tuple(value.shape)) for key, value in extra.items()]
    report = LoraReport(
        output=str(target),
        method=source.options.label(),
        about=source.options.card(),
        layers=[ExportedLayer(name, layer.shape, layer.rank, ranks[name]) for name, layer in source.layers.items()],
        modules_to_save=config["modules_to_save"] or [],
        dtype=str(dtype).removeprefix("torch."),
        bytes=sum(info.bytes for info in infos),
        base_model=source.base_model,
        revision=source.revision,
        model_class=source.model_class,
    )
    source.factors(next(iter(source.layers)))  # refuses another base before anything is announced or written
    if announce is not None:
        announce(report.announcement())
    with atomic_folder(target, LORA, overwrite=overwrite) as folder:
        bar = tqdm(total=report.bytes, unit="B", unit_scale=True, desc="exporting", disable=not progress)
        with bar, ShardWriter(folder / WEIGHTS_FILE, infos) as writer:
            sizes = {info.key: info.bytes for info in infos}
            for key, value in _tensors(source, writer.plan, ranks, extra, report.errors):
                writer.write(key, value)
                bar.update(sizes[key])
        write_peft_config(config, folder / CONFIG_FILE)
        write_card(folder, report)
        write_report(folder, report)
    return report


def _tensors(
    source: Source,
    plan: list[TensorInfo],
    ranks: Mapping[str, int],
    extra: Mapping[str, Tensor],
    errors: dict[str, float],
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in the order of the file: A and B of a layer together, so one pair is in memory at a time."""
    pair: dict[str, Tensor] = {}
    for info in plan:
        name = info.key.removeprefix(_PREFIX)
        if name in extra:
            yield info.key, extra[name]
            continue
        name = name.rsplit(".lora_", 1)[0]
        if not pair:
            a, b, error = lora_pair(source.factors(name), ranks[name])
            if error is not None:
                errors[name] = error
            pair = {f"{_PREFIX}{name}.lora_{side}.weight": t.to(info.dtype) for side, t in (("A", a), ("B", b))}
            if broken := not_finite(pair):
                raise ValueError(
                    f"{few(broken)}: NaN or infinite values in {info.dtype}; nothing is written. The run diverged, or"
                    " the update is too large for this dtype: leave it out for float32."
                )
        yield info.key, pair.pop(info.key)


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
