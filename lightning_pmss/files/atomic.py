"""Write a whole folder or nothing.

A folder is written into a hidden sibling, flushed to the disk and put in place by a rename (`lightning_pmss.disk`), so at
every moment the target is either the complete old folder or the complete new one.

What may be overwritten: only what this library wrote. Its folders carry a manifest (``adapter_config.json``,
``merge_report.json`` or ``export_report.json``) with ``"written_by": "lightning-pmss"`` and the list of the files.
Anything in the target that is not on that list is somebody else's, and then even ``overwrite=True`` refuses.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_pmss.disk import clean_leftovers, explain_full_disk, replace, sync_tree, temporary_sibling

WRITTEN_BY = "lightning-pmss"
MANIFESTS = ("adapter_config.json", "merge_report.json", "export_report.json")
_LITTER = {".DS_Store", "Thumbs.db", "desktop.ini"}  # written by file managers, nobody misses them


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block ends without an exception.

    Args:
        path: the folder to write; its parents are made.
        overwrite: replace an existing folder that this library wrote.

    Raises:
        FileExistsError: `path` is a file, a non-empty folder (without `overwrite`), or holds files of others.
    """
    target = Path(path).expanduser().resolve()  # through a link, so that the folder is replaced and not the link
    target.parent.mkdir(parents=True, exist_ok=True)
    clean_leftovers(target)
    check_target(target, overwrite=overwrite)
    temporary, lock = temporary_sibling(target, folder=True)
    try:
        yield temporary
        _share(temporary)
        sync_tree(temporary)
        check_target(target, overwrite=overwrite)  # again: minutes or hours may have passed
        replace(temporary, target)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        explain_full_disk(error, target)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def check_target(path: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Refuse a target that may not be written; called early so that nobody waits for a refusal.

    Raises:
        FileExistsError: see `atomic_folder`.
    """
    target = Path(path).expanduser()
    if not target.exists():
        return
    if not target.is_dir():
        raise FileExistsError(f"{target} is a file, and a folder is to be written there. Give another name.")
    present = {entry.name for entry in target.iterdir()} - _LITTER
    if not present:
        return
    if not overwrite:
        raise FileExistsError(
            f"{target} exists and is not empty. To replace it give --overwrite (in Python: overwrite=True), "
            "or name another folder."
        )
    foreign = sorted(_files_below(target) - _own_files(target))
    if foreign:
        shown = ", ".join(foreign[:5]) + (f" and {len(foreign) - 5} more" if len(foreign) > 5 else "")
        raise FileExistsError(
            f"{target} holds files that lightning-pmss did not write ({shown}), and overwriting would destroy them. "
            "Move them away, or name another folder."
        )


def files_below(folder: Path) -> list[str]:
    """The files of `folder` as sorted relative POSIX paths: what a manifest has to list."""
    return sorted(_files_below(folder))


def _files_below(folder: Path) -> set[str]:
    found = set()
    for entry in folder.rglob("*"):
        # An empty folder loses nothing; a link counts as a file, whatever it points to.
        if (entry.is_symlink() or not entry.is_dir()) and entry.name not in _LITTER:
            found.add(entry.relative_to(folder).as_posix())
    return found


def _own_files(folder: Path) -> set[str]:
    """The files that a manifest of ours lists, the manifests themselves included."""
    own: set[str] = set()
    for name in MANIFESTS:
        try:
            manifest: Any = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(manifest, dict) and manifest.get("written_by") == WRITTEN_BY:
            own.add(name)
            files = manifest.get("files", [])
            own.update(file for file in files if isinstance(file, str))
    return own


def _share(folder: Path) -> None:
    """Let files be read by those who may read the folder: safetensors writes its files for their owner alone."""
    allowed = folder.stat().st_mode & 0o666  # a new folder's mode tells the umask
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            file.chmod(file.stat().st_mode | allowed)
