"""Check the output folders of a run before the training, and write elsewhere if one fails after it."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_pmss.checkpoints.plugin import local_path
from lightning_pmss.conversion.convert import conversion_of
from lightning_pmss.distributed.ranks import together
from lightning_pmss.files.base import base_of
from lightning_pmss.files.model_folder import refuse_overlap
from lightning_pmss.layers.adapter import Adapter
from lightning_pmss.layers.parts import is_sharded, whole_size
from lightning_pmss.store.atomic import check_target
from lightning_pmss.store.disk import clean_folder
from lightning_pmss.store.kinds import ADAPTER, MERGED

T = TypeVar("T")
# Checkpoint of a stopped run. Trainer.fit(ckpt_path="last") finds it: the newest file whose name begins with "last".
STOPPED_CHECKPOINT = "last-interrupted.ckpt"
STOPPED_ADAPTER = "adapter-interrupted"  # used if an earlier run left an adapter
_FULL = (errno.ENOSPC, errno.EDQUOT)
_REMEDY = "Give --pmss.output_dir (in Python: PMSSCallback(output_dir=...)) another folder"


def local_folder(folder: str | os.PathLike[str], what: str) -> Path:
    """Path of a folder on this machine.

    Args:
        folder: Path or URL.
        what: Content of the folder, for the message.

    Raises:
        ValueError: ``folder`` is a URL of another file system.
    """
    if (path := local_path(folder)) is None:
        raise ValueError(
            f"{folder} is not on this machine, and {what} can only be written to a local folder. {_REMEDY}."
        )
    return path


def check_before_conversion(trainer: L.Trainer, folder: Path, merge: str | None) -> None:
    """Refuse, on every rank, output folders that are not writable or contain foreign files.

    Unfinished files of killed runs are removed from these folders.

    Args:
        trainer: Trainer of the fit.
        folder: Folder of adapter and merged model.
        merge: Option ``merge_on_save``.

    Raises:
        OSError: A folder is not writable, or other files are in the way.
        ValueError: Merged models are requested beside checkpoints that are not on this machine.
    """
    targets = {folder / "adapter": ADAPTER, folder / STOPPED_ADAPTER: ADAPTER}
    targets |= {} if merge is None else {folder / "merged": MERGED}
    beside = merge == "checkpoint"
    checkpoints = checkpoint_folders(trainer, local=beside)

    def check() -> None:
        if not trainer.is_global_zero:
            return
        for place in sorted({folder, *checkpoints}):
            _check_writable(place)
            clean_folder(place)
        for target, kind in targets.items():
            check_target(target, kind, overwrite=True)
        for place in checkpoints if beside else ():
            for merged in sorted(place.glob("*-merged")):
                check_target(merged, MERGED, overwrite=True)

    together(trainer.strategy, check)


def check_before_training(trainer: L.Trainer, module: L.LightningModule, folder: Path, merge: str | None) -> None:
    """Repeat `check_before_conversion` with all checkpoint folders known; check the base's folder and disk space.

    Raises:
        OSError: See `check_before_conversion`.
        ValueError: The merged model would be written to the folder of its own base.
    """
    check_before_conversion(trainer, folder, merge)

    def check() -> None:
        if merge is not None and trainer.is_global_zero:
            _check_base_is_elsewhere(module, folder / "merged")

    together(trainer.strategy, check)
    _warn_about_space(module, folder, checkpoint_folders(trainer), merge=merge is not None)


def _check_writable(folder: Path) -> None:
    """Raise OSError if a folder and files in it cannot be created; writes no test file, which a kill would leave."""
    existing = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    if not existing.is_dir():
        number = errno.ENOTDIR
    elif not os.access(existing, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        read_only = sys.platform != "win32" and os.statvfs(existing).f_flag & os.ST_RDONLY
        number = errno.EROFS if read_only else errno.EACCES
    else:
        return
    text = f"{os.strerror(number)}: nothing can be written in {folder}, where this run's results go. {_REMEDY}"
    raise OSError(number, text, str(existing))


def _check_base_is_elsewhere(module: L.LightningModule, merged: Path) -> None:
    """Refuse to merge into the base's folder; only a merge in memory may write to a folder inside it."""
    base = base_of(module).folder
    if base is None:
        return
    place, source = merged.resolve(), base.resolve()
    if not is_sharded(module) and place != source and place.is_relative_to(source):
        return  # such as the log folder of a run that was started in the base's folder
    try:
        refuse_overlap(merged, {"base": base})
    except ValueError as error:
        raise ValueError(f"{error} {_REMEDY}.") from None


def _warn_about_space(module: L.LightningModule, folder: Path, checkpoints: dict[Path, int], *, merge: bool) -> None:
    """Warn if a disk has less free space than the run will need, roughly."""
    report = conversion_of(module)
    if report is None:
        return
    ours = {id(p) for m in module.modules() if isinstance(m, Adapter) for p in m.parameters()}
    model = sum(whole_size(p) * p.element_size() for p in module.parameters() if id(p) not in ours)
    parts = [(folder, report.adapter_bytes, "the adapter")]
    parts += [(folder, model, "the merged model")] if merge else []
    # A checkpoint contains trained tensors and Adam's two moments; it is complete before an old one is removed.
    parts += [(place, 12 * report.trainable * (kept + 1), "checkpoints") for place, kept in checkpoints.items()]
    disks: dict[int, list[tuple[Path, int, str]]] = {}
    for part in parts:
        disks.setdefault(_existing(part[0]).stat().st_dev, []).append(part)
    for there in disks.values():
        free = shutil.disk_usage(_existing(there[0][0])).free
        if sum(size for _, size, _ in there) > free:
            listed = ", ".join(f"{what} (about {_gigabytes(size)}) in {place}" for place, size, what in there)
            rank_zero_warn(
                f"{_gigabytes(free)} are free on the disk of {listed}. Make room, or write elsewhere: output_dir."
            )


def _existing(folder: Path) -> Path:
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB"


def somewhere(trainer: L.Trainer, target: Path, write: Callable[[Path], T]) -> tuple[Path, T]:
    """Write to ``target`` or, if that fails, beside it or elsewhere, so that the trained tensors are not lost.

    Args:
        trainer: Trainer of the fit; call this on all ranks.
        target: Intended path of the result.
        write: Writes to a path, and is called again for the next one; only rank 0 may raise an OSError.

    Returns:
        The path written, and the result of ``write``.

    Raises:
        OSError: The error at ``target``, if all other paths fail, too.
    """
    places = _places(target, local_path(trainer.default_root_dir))
    first: OSError | None = None
    place: Path | None = target
    while place is not None:
        try:
            result = together(trainer.strategy, partial(write, place))
        except OSError as error:
            first = first or error
            place = trainer.strategy.broadcast(_next(places, target, error) if trainer.is_global_zero else None)
        else:
            if first is not None:
                rank_zero_warn(f"{target} could not be written ({first}). The result is in {place} instead.")
            return place, result
    assert first is not None
    raise first


def _places(target: Path, root: Path | None) -> Iterator[Path]:
    """Alternatives to ``target``, none of which exists."""
    elsewhere = [folder for folder in (root, Path(tempfile.gettempdir())) if folder is not None]
    named = [target, *(folder / f"{target.parent.name}-{target.name}" for folder in elsewhere)]
    for place in named:
        numbered = (place.with_name(f"{place.stem}-{number}{place.suffix}") for number in range(2, 1000))
        yield next(candidate for candidate in numbered if not os.path.lexists(candidate))


def _next(places: Iterator[Path], target: Path, error: OSError) -> Path | None:
    """Next alternative; if the disk is full, the next one on another disk."""
    for place in places:
        if error.errno not in _FULL or _existing(place.parent).stat().st_dev != _existing(target.parent).stat().st_dev:
            return place
    return None


def checkpoint_folders(trainer: L.Trainer, *, local: bool = False) -> dict[Path, int]:
    """Number of checkpoints kept, by local folder of the checkpoint callbacks, as far as these are known.

    Args:
        trainer: Trainer with its callbacks.
        local: Refuse folders on other machines, since merged models are written beside the checkpoints.
    """
    found: dict[Path, int] = {}
    for callback in trainer.checkpoint_callbacks:
        folder = getattr(callback, "dirpath", None)
        if folder is None:
            continue
        path = local_folder(folder, "a merged model beside each checkpoint") if local else local_path(folder)
        if path is not None:
            kept = max(getattr(callback, "save_top_k", 1), 1) + bool(getattr(callback, "save_last", False))
            found[path] = found.get(path, 0) + kept
    return found
