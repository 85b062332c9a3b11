"""Write a whole folder or nothing.

A folder is written into a hidden sibling, flushed to the disk and put in place by a rename, so at every moment the
target is either the complete old folder or the complete new one. Whatever stops the writing (an exception, a full
disk, a kill), the old folder stays.

Leftovers of killed runs are hidden siblings called ``.<name>.pmss-tmp-<random>`` (unfinished) or
``.<name>.pmss-old-<random>`` (the folder about to be replaced). A live run holds a lock on its own, which the kernel
lets go when the process ends, so the next run to the same target removes the dead ones and no others.

What may be overwritten: only what this library wrote. Its folders carry a manifest (``adapter_config.json``,
``merge_report.json`` or ``export_report.json``) with ``"written_by": "lightning-pmss"`` and the list of the files.
Anything in the target that is not on that list is somebody else's, and then even ``overwrite=True`` refuses.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: no locks, hence leftovers are never removed there
    fcntl = None  # type: ignore[assignment]

WRITTEN_BY = "lightning-pmss"
MANIFESTS = ("adapter_config.json", "merge_report.json", "export_report.json")
_LITTER = {".DS_Store", "Thumbs.db", "desktop.ini"}  # written by file managers, nobody misses them
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


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
    _clean_leftovers(target)
    check_target(target, overwrite=overwrite)
    temporary, lock = _locked_folder(target)
    try:
        yield temporary
        _share(temporary)
        _sync_tree(temporary)
        check_target(target, overwrite=overwrite)  # again: minutes or hours may have passed
        _replace(temporary, target)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            error.add_note(f"The disk is full. Nothing was changed at {target}; free some space and run again.")
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


def _locked_folder(target: Path) -> tuple[Path, int | None]:
    """Make the temporary sibling and lock it; the lock tells later runs that its writer is alive."""
    while True:
        temporary = target.parent / f".{target.name}.pmss-tmp-{secrets.token_hex(6)}"
        temporary.mkdir()
        if fcntl is None:
            return temporary, None
        handle = os.open(temporary, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: no run can lock there, so none will clean there either
            os.close(handle)
            return temporary, None
        if temporary.exists():  # a cleaning run may have caught the folder between mkdir and lock
            return temporary, handle
        os.close(handle)


def _clean_leftovers(target: Path) -> None:
    """Remove what killed runs left for this target; bring the old folder back if the kill fell between two renames."""
    if fcntl is None:
        return
    for leftover in sorted(target.parent.glob(f".{_escape(target.name)}.pmss-*-*")):
        kind = leftover.name.rsplit("-", 2)[-2]
        if not leftover.is_dir() or kind not in ("tmp", "old"):
            continue
        try:
            handle = os.open(leftover, os.O_RDONLY)
        except OSError:
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # a live run holds it
            continue
        else:
            if kind == "old" and not target.exists():
                leftover.rename(target)
            else:
                shutil.rmtree(leftover, ignore_errors=True)
        finally:
            os.close(handle)


def _escape(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _share(folder: Path) -> None:
    """Let files be read by those who may read the folder: safetensors writes its files for their owner alone."""
    allowed = folder.stat().st_mode & 0o666  # a new folder's mode tells the umask
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            file.chmod(file.stat().st_mode | allowed)


def _sync_tree(folder: Path) -> None:
    """Flush every file and folder; without it a power cut after the rename can leave empty files."""
    for root, _, names in os.walk(folder):
        for name in names:
            _sync(Path(root) / name)
        _sync(Path(root))


def _sync(path: Path) -> None:
    if path.is_dir() and sys.platform == "win32":
        return  # folders cannot be opened there
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _replace(temporary: Path, target: Path) -> None:
    if target.is_symlink() or not target.exists():
        temporary.rename(target)
    elif _exchange(temporary, target):
        shutil.rmtree(temporary, ignore_errors=True)  # the name now holds the old folder
    else:
        old = target.parent / f".{target.name}.pmss-old-{secrets.token_hex(6)}"
        target.rename(old)
        try:
            temporary.rename(target)
        except BaseException:
            old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    _sync(target.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one step where the system can (Linux); False where it cannot."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    done: int = renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    return done == 0
