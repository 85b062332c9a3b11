"""Where a run writes: looked at before the training; and another place, where one fails after it."""

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
# Of a run that was stopped. Trainer.fit(ckpt_path="last") finds it: the newest of those whose names begin with "last".
STOPPED_CHECKPOINT = "last-interrupted.ckpt"
STOPPED_ADAPTER = "adapter-interrupted"  # where an earlier run has left an adapter
_FULL = (errno.ENOSPC, errno.EDQUOT)
_REMEDY = "Give --pmss.output_dir (in Python: PMSSCallback(output_dir=...)) another folder"


def local_folder(folder: str | os.PathLike[str], what: str) -> Path:
    """A folder of this machine.

    Args:
        folder: Path or URL.
        what: What is written there, for the message.

    Raises:
        ValueError: It is a URL of another file system.
    """
    if (path := local_path(folder)) is None:
        raise ValueError(
            f"{folder} is not on this machine, and {what} can only be written to a local folder. {_REMEDY}."
        )
    return path


def check_before_conversion(trainer: L.Trainer, folder: Path, merge: str | None) -> None:
    """Refuse, on every rank, what would fail after hours: what is in the way of results, and where nothing can be written.

    What killed runs left unfinished in these places is removed.

    Args:
        trainer: Of the fit.
        folder: Where adapter and merged model go.
        merge: ``merge_on_save``.

    Raises:
        OSError: With what is in the way and what to type.
        ValueError: A merged model was asked for beside checkpoints that are not on this machine.
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
    """The same when the model is there and all folders of checkpoints are known; warn where the disk has too little room.

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
    """Ask the system whether a folder can be made here, and files in it; nothing is written, which a kill could leave."""
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
    """A merge that is streamed from the base needs a place outside of it; any other one may lie inside."""
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
    """Warn where the disk has less room than what is going to be written, roughly."""
    report = conversion_of(module)
    if report is None:
        return
    ours = {id(p) for m in module.modules() if isinstance(m, Adapter) for p in m.parameters()}
    model = sum(whole_size(p) * p.element_size() for p in module.parameters() if id(p) not in ours)
    parts = [(folder, report.adapter_bytes, "the adapter")]
    parts += [(folder, model, "the merged model")] if merge else []
    # A checkpoint holds what is trained and Adam's two moments; the new one is complete before an old one goes.
    parts += [(place, 12 * report.trainable * (kept + 1), "checkpoints") for place, kept in checkpoints.items()]
    disks: dict[int, list[tuple[Path, int, str]]] = {}
    for part in parts:
        disks.setdefault(_existing(part[0]).stat().st_dev, []).append(part)
    for there in disks.values():
        free = shutil.disk_usage(_existing(there[0][0])).free
        if sum(size for _, size, _ in there) > free:
            told = ", ".join(f"{what} (about {_gigabytes(size)}) in {place}" for place, size, what in there)
            rank_zero_warn(
                f"{_gigabytes(free)} are free on the disk of {told}. Make room, or write elsewhere: output_dir."
            )


def _existing(folder: Path) -> Path:
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB"


def somewhere(trainer: L.Trainer, target: Path, write: Callable[[Path], T]) -> tuple[Path, T]:
    """Write to `target`, or beside it, or elsewhere: what was trained must not be lost to what is in the way now.

    Args:
        trainer: Of all ranks; call it on all.
        target: Where the result belongs.
        write: Writes to a place; only rank 0's may fail with an OSError. It is called again for the next place.

    Returns:
        The place that took it, and what `write` returned.

    Raises:
        OSError: The first place's error, if none took it.
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
                rank_zero_warn(f"{target} could not be written ({first}). What belongs there is in {place}.")
            return place, result
    assert first is not None
    raise first


def _places(target: Path, root: Path | None) -> Iterator[Path]:
    """Where else something may go; what exists is never touched."""
    elsewhere = [folder for folder in (root, Path(tempfile.gettempdir())) if folder is not None]
    named = [target, *(folder / f"{target.parent.name}-{target.name}" for folder in elsewhere)]
    for place in named:
        numbered = (place.with_name(f"{place.stem}-{number}{place.suffix}") for number in range(2, 1000))
        yield next(candidate for candidate in numbered if not os.path.lexists(candidate))


def _next(places: Iterator[Path], target: Path, error: OSError) -> Path | None:
    """The next place; one on the same disk is no help where that is full."""
    for place in places:
        if error.errno not in _FULL or _existing(place.parent).stat().st_dev != _existing(target.parent).stat().st_dev:
            return place
    return None


def checkpoint_folders(trainer: L.Trainer, *, local: bool = False) -> dict[Path, int]:
    """Folders of the checkpoint callbacks that are known by now, on this machine -> how many are kept in each.

    Args:
        trainer: With its callbacks.
        local: Refuse those on other machines, since merged models are written beside the checkpoints.
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
