"""Derive a method's frozen tensors from a model on disk, matrix by matrix, and write them as a skeleton file.

PMSS selects rows and columns, LoRA-XS computes singular vectors. The architecture is built on the meta device, and each worker
reads one matrix at a time from the safetensors files, so neither memory for the model nor a GPU is needed. The result equals
that of `convert` on the loaded model.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lightning_pmss.files.adapter_file import library_versions
from lightning_pmss.files.architecture import Target, find_matrices, model_on_meta
from lightning_pmss.files.pieces import Pieces, file_state, keeping
from lightning_pmss.files.process_memory import peak_memory
from lightning_pmss.files.select_report import SelectedLayer, SelectReport
from lightning_pmss.files.skeleton_file import kind_of, refuse_others
from lightning_pmss.layers.fingerprint import fingerprint, same_base
from lightning_pmss.layers.products import core_dtype
from lightning_pmss.methods import method_of
from lightning_pmss.methods.config import AdapterConfig
from lightning_pmss.methods.method import Update
from lightning_pmss.methods.skeleton import FORMAT_VERSION, METADATA
from lightning_pmss.store import describe_tensors
from lightning_pmss.store.disk import atomic_file
from lightning_pmss.store.shards import ShardReader, ShardWriter, TensorInfo, few, open_shards

Result = TypeVar("Result")


def select_files(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    config: AdapterConfig,
    *,
    architecture: str | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> SelectReport:
    """Derive the frozen tensors of every matrix that `convert` would convert, and write the skeleton file.

    An interrupted run leaves ``<output>.partial/``; the next run with the same options resumes it.

    Args:
        model: Folder with ``config.json`` and safetensors weights, single or sharded.
        output: File to write; appears only when it is complete. Format: `lightning_pmss.methods.skeleton`.
        config: Of PMSS, CURLoRA or LoRA-XS: targets, ranks and what else a skeleton depends on
            (`AdapterConfig.skeleton_options`); its other fields are ignored.
        architecture: Class of transformers to convert; by default the one that ``config.json`` names.
        workers: Matrices at a time, one thread each; by default the CPU cores that this process may use. Each needs memory
            for one matrix and its float32 copies.
        overwrite: Replace an earlier skeleton file, and unfinished work with other options or of another base.
        progress: Show a progress bar.

    Raises:
        FileNotFoundError: No model folder, no ``config.json``, no weights or a missing shard.
        FileExistsError: The output exists (without ``overwrite``), is not a skeleton file, or another run is writing it.
        ValueError: As `convert` raises (a pattern matches nothing, NaN, a zero matrix, linearly dependent rows or columns);
            weights missing, quantised or of other shapes; unfinished work with other options or of another base.
    """
    start = time.perf_counter()
    folder, target_file = Path(model).expanduser(), Path(output).expanduser()
    _refuse(target_file, config, workers, overwrite)
    with open_shards(folder) as reader:
        net = model_on_meta(folder, architecture)
        targets, left_out = find_matrices(net, config, reader)
    options = {name: getattr(config, name) for name in config.per_matrix}
    doing = method_of(config).doing
    with keeping(target_file, options, overwrite=overwrite) as pieces:
        count = max(1, min(workers or _cores(), len(targets)))
        with one_thread(), ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            update_class = method_of(config).update_class
            _check_base(pieces, reader, targets, partial(_each, pool, progress), overwrite, update_class)
            finished = [target for target in targets if _is_finished(pieces, target)]
            todo = [target for target in targets if target not in finished]
            begun = time.perf_counter()
            work = partial(_select, reader=reader, config=config, pieces=pieces)
            for _ in _each(pool, progress, work, todo, doing, len(finished)):
                pass
            selecting = time.perf_counter() - begun
        about = {
            "format_version": FORMAT_VERSION,
            **kind_of(config),
            "options": {name: getattr(config, name) for name in config.skeleton_options()},
            "base": {"name": folder.resolve().name, "architecture": type(net).__name__},
            "versions": library_versions(),
        }
        _refuse_output(target_file, overwrite)
        layers = _write(target_file, targets, pieces, about)
    return SelectReport(
        output=str(target_file),
        architecture=type(net).__name__,
        selection=config.summary(),
        layers=layers,
        left_out=left_out,
        resumed=len(finished),
        workers=count,
        seconds=time.perf_counter() - start,
        selecting_seconds=selecting,
        bytes=target_file.stat().st_size,
        peak_memory=peak_memory(),
    )


def _refuse(output: Path, config: AdapterConfig, workers: int | None, overwrite: bool) -> None:
    """Refuse options and outputs that are unusable before any file is opened."""
    if not config.per_matrix:
        raise ValueError(f"{config.label()} derives nothing from the weights, so it needs no skeleton file.")
    if getattr(config, "skeleton_file", None) is not None:
        raise ValueError("skeleton_file is given, but selecting makes such a file; leave it out.")
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers} is not a number of workers; type at least 1, or leave it out.")
    _refuse_output(output, overwrite)


def _refuse_output(output: Path, overwrite: bool) -> None:
    """Refuse an unusable output; called again before the file is moved to its place, possibly hours later."""
    if output.is_dir():
        raise FileExistsError(f"{output} is a folder; name a file in it, such as {output / 'skeleton.safetensors'}.")
    if not output.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{output} exists. To replace it give --overwrite, or name another file.")
    refuse_others(output)


def _each(
    pool: ThreadPoolExecutor,
    progress: bool,
    work: Callable[[Target], Result],
    todo: Sequence[Target],
    title: str,
    done: int = 0,
) -> Iterator[tuple[Target, Result]]:
    """Run ``work`` on every target and yield results as they finish; after an error no further target is started."""
    futures = {pool.submit(work, target): target for target in todo}
    total = done + len(todo)
    try:
        with tqdm(desc=title, total=total, initial=done, unit="matrix", disable=not progress) as bar:
            for future in as_completed(futures):
                yield futures[future], future.result()
                bar.update()
    except BaseException:
        pool.shutdown(wait=True, cancel_futures=True)
        raise


def _select(target: Target, reader: ShardReader, config: AdapterConfig, pieces: Pieces) -> None:
    """Derive the tensors of one matrix and save them."""
    weight = _read(target, reader)
    method = method_of(config)
    derived = method.derive(weight, target.rank, target.name, {})
    # Checked for the stored dtype; conversion checks again for the dtype that the model is loaded in.
    scale, dtype = config.scale_of(target.rank, target.shape), core_dtype(weight.dtype)
    if reason := method.why_untrainable(weight, derived, scale, dtype):
        raise ValueError(f"`{target.name}` {reason}")
    tensors = {part: t.to(dtype if t.is_floating_point() else torch.int32) for part, t in derived.items()}
    layer = {
        "shape": list(target.shape),
        "fingerprint": fingerprint(*method.update_class.reads(weight, derived)),
        "residual": method.figures(weight, derived, dtype).get("residual"),
        "tensors": describe_tensors(tensors),
    }
    pieces.save(target.name, tensors, target.rank, _source(target, reader), layer)


def _read(target: Target, reader: ShardReader) -> Tensor:
    """Read W in canonical layout. Its own reader unmaps the shard with the matrix, so mapped pages do not accumulate."""
    with ShardReader(reader.folder, reader.tensors) as own:
        weight = own.read(target.key)
    return target.layout.canonical(weight)


def _source(target: Target, reader: ShardReader) -> list[int]:
    return file_state(reader.folder / reader.matrices[target.key].file)


def _is_finished(pieces: Pieces, target: Target) -> bool:
    piece = pieces.found.get(target.name)
    return piece is not None and piece.rank == target.rank and tuple(piece.layer.shape) == target.shape


def _check_base(
    pieces: Pieces,
    reader: ShardReader,
    targets: Sequence[Target],
    each: Callable[[Callable[[Target], bool], Sequence[Target], str], Iterator[tuple[Target, bool]]],
    overwrite: bool,
    update_class: type[Update],
) -> None:
    """If a file of the base changed in size or time, continue only if its weights match the finished pieces."""

    def same(target: Target) -> bool:
        layer, stored = pieces.load(target.name)
        indices = {part: t.long() for part, t in stored.items() if not t.is_floating_point()}
        return same_base(layer.fingerprint.model_dump(), *update_class.reads(_read(target, reader), indices))

    finished = [target for target in targets if _is_finished(pieces, target)]
    suspects = [target for target in finished if pieces.found[target.name].source != _source(target, reader)]
    if not suspects:
        return
    strangers = [target.name for target, fits in each(same, suspects, "checking what is finished") if not fits]
    if strangers and not overwrite:
        raise ValueError(
            f"{pieces.folder} contains an unfinished selection from another base: {few(strangers)} in {reader.folder} are not "
            "the weights it was made from. Start anew with --overwrite, or give another --output."
        )
    if strangers:  # all suspects, because the others may differ outside of the compared rows and columns
        pieces.forget([target.name for target in suspects])


def _write(output: Path, targets: Sequence[Target], pieces: Pieces, about: dict[str, Any]) -> list[SelectedLayer]:
    """Join the pieces into one file, one piece in memory at a time."""
    infos: list[TensorInfo] = []
    layers: list[SelectedLayer] = []
    modules: dict[str, Any] = {}
    for target in targets:
        layer, stored = pieces.load(target.name)
        modules[target.name] = layer.model_dump()
        infos += [TensorInfo(f"{target.name}.{k}", v.dtype, tuple(v.shape), target.name) for k, v in stored.items()]
        layers.append(SelectedLayer(target.name, target.shape, target.rank, target.requested_rank, layer.residual))
    about = {METADATA: json.dumps({**about, "modules": modules})}
    with atomic_file(output) as temporary, ShardWriter(temporary, infos, about) as writer:
        held: tuple[str, dict[str, Tensor]] = ("", {})
        for info in writer.plan:
            if held[0] != info.file:
                held = (info.file, pieces.load(info.file)[1])
            writer.write(info.key, held[1][info.key.removeprefix(f"{info.file}.")])
    return layers


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))  # a scheduler may allow fewer than the machine has
    except AttributeError:
        return os.cpu_count() or 1


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one torch thread per matrix: several matrices at a time use the cores better than one split product."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
