"""Write files beside their target, flush them, and put them in place by a rename.

At every moment the target is either the complete old content or the complete new one. If
anything stops the writing (an exception, a full disk, a kill, a power cut), the old content stays.

Unfinished content is in a hidden sibling called ``.<name>.pmss-tmp-<random>``; ``.<name>.pmss-old-<random>`` is old content
about to be removed. A live writer locks its sibling, and the kernel releases the lock when the process ends, so that others
remove the leftovers of dead writers only.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows: no locks, hence leftovers are never removed there
    fcntl = None  # type: ignore[assignment]

_LEFTOVER = re.compile(r"\.(?P<name>.+)\.pmss-(?P<kind>tmp|old)-[0-9a-f]{12}")
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str], *, over_folder: bool = False) -> Iterator[BinaryIO]:
    """Yield a binary stream whose content becomes the file `path` when the block ends without an exception.

    A link of that name is replaced, not followed. The folder of `path` is made.

    Args:
        path: The file.
        over_folder: Replace a folder of that name too, with its content.

    Raises:
        OSError: See `atomic_path`.
    """
    with atomic_path(path, over_folder=over_folder) as temporary, temporary.open("wb") as stream:
        yield stream


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str], *, over_folder: bool = False) -> Iterator[Path]:
    """Yield an empty temporary file that becomes `path`, for writers that take a file name.

    Raises:
        IsADirectoryError: `path` is a folder, and `over_folder` is not given.
        FileExistsError: `path` is a pipe or a device.
        OSError: The file cannot be written; the old content is unchanged.
    """
    target = Path(path).expanduser()
    refuse_special(target, over_folder=over_folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    clean_leftovers(target)
    temporary, lock = temporary_sibling(target, folder=False)
    allowed = temporary.stat().st_mode & 0o666
    try:
        yield temporary
        temporary.chmod(temporary.stat().st_mode | allowed)  # safetensors writes files for their owner alone
        sync(temporary)
        replace(temporary, target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        explain_full_disk(error, target)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def refuse_special(target: Path, *, over_folder: bool = False) -> None:
    """Refuse a path where no file can be put; also called early, so that a refusal comes before long work.

    Raises:
        IsADirectoryError: A folder, and `over_folder` is not given.
        FileExistsError: A pipe or a device.
    """
    if target.is_dir() and not over_folder:
        raise IsADirectoryError(f"{target} is a folder, and a file is to be written there. Name a file in it.")
    if target.exists() and not (target.is_file() or target.is_dir()):
        raise FileExistsError(f"{target} is no regular file, and is not replaced. Name another file.")


def explain_full_disk(error: BaseException, target: Path) -> None:
    """Add the state of the target to the error of a full disk."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        error.add_note(f"The disk is full. Nothing was changed at {target}; free some space and run again.")


def temporary_sibling(target: Path, *, folder: bool) -> tuple[Path, int | None]:
    """Make an empty hidden sibling of `target` and lock it.

    Returns:
        The sibling, and the open lock (None if the file system has no locks); close it when the sibling is in place.
    """
    while True:
        temporary = target.parent / f".{target.name}.pmss-tmp-{secrets.token_hex(6)}"
        if folder:
            temporary.mkdir()
        else:
            temporary.touch(exist_ok=False)
        if fcntl is None:
            return temporary, None
        handle = os.open(temporary, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: no run can lock there, so none will clean there either
            os.close(handle)
            return temporary, None
        if temporary.exists():  # a cleaning run may have removed it before it was locked
            return temporary, handle
        os.close(handle)


@contextlib.contextmanager
def held(folder: Path, refusal: str) -> Iterator[None]:
    """Lock an existing folder for this process, until the block or the process ends.

    Raises:
        FileExistsError: Another process has locked it; the text is `refusal`.
    """
    handle = None
    if fcntl is not None:
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise FileExistsError(refusal) from None
        except OSError:  # a file system without locks
            pass
        if not folder.is_dir():  # the process that had locked it has just removed it
            os.close(handle)
            raise FileExistsError(refusal)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def clean_leftovers(target: Path) -> None:
    """Remove leftovers of killed writers of this target; restore the old content after a kill between two renames."""
    clean_folder(target.parent, only=target.name)


def clean_folder(folder: Path, only: str | None = None) -> None:
    """Do the same for all targets in a folder, or for the one called `only`."""
    if fcntl is None or not folder.is_dir():
        return
    for leftover in sorted(folder.iterdir()):
        found = _LEFTOVER.fullmatch(leftover.name)
        if found is None or only not in (None, found["name"]):
            continue
        if leftover.is_symlink():
            leftover.unlink(missing_ok=True)
            continue
        try:
            handle = os.open(leftover, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # a pipe would wait for a writer
        except OSError:
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # a live run has locked it
            continue
        else:
            target = folder / found["name"]
            if found["kind"] == "old" and not os.path.lexists(target):
                leftover.rename(target)
            else:
                remove(leftover)
        finally:
            os.close(handle)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with its content; nothing happens if it is gone or cannot be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def sync_tree(folder: Path) -> None:
    """Flush every file and folder; without it a power cut after the rename can leave empty files."""
    for root, _, names in os.walk(folder):
        for name in names:
            sync(Path(root) / name)
        sync(Path(root))


def sync(path: Path) -> None:
    """Flush one file or folder."""
    if path.is_dir() and sys.platform == "win32":
        return  # folders cannot be opened there
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace(temporary: Path, target: Path, discard: Callable[[Path], None] | None = None) -> None:
    """Put a file or folder in the place of another one, or of none; a link is replaced, not followed.

    Args:
        temporary: The new content.
        target: Its new place.
        discard: Removes the old content, if one of the two is a folder; by default `remove`.
    """
    discard = discard or remove
    is_folder = target.is_dir() and not target.is_symlink()
    if not os.path.lexists(target) or not (temporary.is_dir() or is_folder):
        os.replace(temporary, target)
    elif _exchange(temporary, target):
        discard(temporary)  # the name now refers to the old content
    else:
        old = target.parent / f".{target.name}.pmss-old-{secrets.token_hex(6)}"
        target.rename(old)
        try:
            temporary.rename(target)
        except BaseException:
            old.rename(target)
            raise
        discard(old)
    sync(target.parent)


def relink(link: Path, target: Path) -> None:
    """Point a symbolic link to another file or folder, in one step."""
    temporary = link.parent / f".{link.name}.pmss-tmp-{secrets.token_hex(6)}"
    temporary.symlink_to(os.path.relpath(target, link.parent))
    os.replace(temporary, link)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step if the system can (Linux); False if it cannot."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    done: int = renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    return done == 0
