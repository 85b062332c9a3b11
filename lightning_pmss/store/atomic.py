"""Write a whole folder or nothing, and replace or remove only folders of ours.

A folder is written beside its place, flushed to the disk and put there by a rename (`lightning_pmss.store.disk`). `kinds`
defines the replaceable files.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from lightning_pmss.store.disk import beside, put, sync_tree
from lightning_pmss.store.kinds import KINDS, FolderKind, entries, is_litter
from lightning_pmss.store.shards import few


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str], kind: FolderKind, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block ends without an exception.

    Args:
        path: The folder to write; its parents are made. A link to a folder stays, and the folder is replaced.
        kind: Kind of the folder.
        overwrite: Replace an existing folder, if it is of this kind and contains nothing else.

    Raises:
        FileExistsError: See `check_target`.
    """
    target = Path(path).expanduser().resolve()
    with beside(target) as new:  # which restores what a killed run has moved aside
        check_target(target, kind, overwrite=overwrite)
        new.mkdir()
        yield new
        _share(new)
        sync_tree(new)
        check_target(target, kind, overwrite=overwrite)  # again: minutes or hours may have passed
        put(new, target)


def check_target(path: str | os.PathLike[str], kind: FolderKind, *, overwrite: bool) -> None:
    """Refuse a target that may not be written; called early, so that a refusal comes before long work.

    Raises:
        FileExistsError: `path` is a file or a mount point, or a non-empty folder that is not to be overwritten, is of another
            kind, or contains files of others.
    """
    target = Path(path).expanduser()
    if not target.exists():
        return
    if not target.is_dir():
        raise FileExistsError(f"{target} is a file, and a folder is to be written there. Give another name.")
    if target.is_mount():
        raise FileExistsError(f"{target} is a mount point, which cannot be replaced; name a folder in it.")
    present = [name for name, _ in entries(target) if not is_litter(name)]
    if not present:
        return
    if not overwrite:
        raise FileExistsError(
            f"{target} exists and is not empty. To replace it give --overwrite (in Python: overwrite=True), "
            "or name another folder."
        )
    _refuse_others(target, kind)


def remove_folder(folder: Path, kind: FolderKind) -> None:
    """Remove a folder of this kind, file by file.

    Raises:
        FileExistsError: It is of another kind, or contains files of others; nothing is removed then.
    """
    _refuse_others(folder, kind)
    *others, last = kind.own(folder) or [kind.manifest]
    for name in others:
        (folder / name).unlink()
    with os.scandir(folder) as found:
        inner = [entry.path for entry in found if entry.is_dir(follow_symlinks=False)]
    for path in inner:
        os.rmdir(path)
    (folder / last).unlink(missing_ok=True)
    folder.rmdir()


def _refuse_others(folder: Path, kind: FolderKind) -> None:
    own = set(kind.own(folder))
    foreign = [name for name, _ in entries(folder) if name not in own]
    if not foreign:
        return
    other = next((other for other in KINDS if other is not kind and other.is_at(folder)), None)
    if other is not None and not kind.is_at(folder):
        raise FileExistsError(
            f"{folder} holds {other.what}, and {kind.what} replaces only {kind.what}. Name another folder, or remove it "
            "yourself."
        )
    raise FileExistsError(
        f"{folder} holds files that lightning-pmss did not write ({few(foreign)}), and overwriting would destroy them. "
        "Move them away, or name another folder."
    )


def _share(folder: Path) -> None:
    """Make files readable for everybody who may read the folder: safetensors writes them for their owner alone."""
    allowed = folder.stat().st_mode & 0o666  # a new folder's mode shows the umask
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            file.chmod(file.stat().st_mode | allowed)
