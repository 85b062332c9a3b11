"""Write files beside their target, flush them, and put them in place by a rename.

At every moment a file is the complete old one or the complete new one. So is a folder, except between two renames: no
portable call swaps two folders. If anything stops the writing (an exception, a full disk, a kill, a power cut), the old content
stays, or the next writer moves it back.

A writer works in a hidden folder ``.<name>.pmss-tmp-<random>`` beside the target:

    .pmss-lock   locked while the writer lives, so that others remove the leftovers of dead writers only
    new          becomes the target
    old          a folder that is being replaced
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

LOCK = ".pmss-lock"
_LEFTOVER = re.compile(r"\.(?P<name>.+)\.pmss-tmp-[0-9a-f]{12}")


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str], *, over_folder: bool = False) -> Iterator[Path]:
    """Yield an empty temporary file that becomes `path` when the block ends without an exception.

    A link of that name is replaced, not followed. The folder of `path` is made.

    Args:
        path: The file.
        over_folder: Replace a folder of that name too, with its content.

    Raises:
        IsADirectoryError: `path` is a folder, and `over_folder` is not given.
        FileExistsError: `path` is a pipe or a device.
        OSError: The file cannot be written; the old content is unchanged.
    """
    target = Path(path).expanduser()
    refuse_special(target, over_folder=over_folder)
    with beside(target) as new:
        new.touch()
        allowed = new.stat().st_mode & 0o666
        yield new
        new.chmod(new.stat().st_mode | allowed)  # safetensors writes files for their owner alone
        sync(new)
        put(new, target)


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


@contextlib.contextmanager
def beside(target: Path) -> Iterator[Path]:
    """Yield a free path on the same disk, to write to and then to `put`; without `put` the new content is removed.

    The folder of `target` is made, and the leftovers of killed writers of this target are removed first.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    clean_folder(target.parent, only=target.name)
    with contextlib.ExitStack() as stack:
        room = _enter(stack, target)
        stack.callback(_restore, room, target)
        try:
            yield room / "new"
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                error.add_note(f"The disk is full. Nothing was changed at {target}; free some space and run again.")
            raise


def put(new: Path, target: Path) -> None:
    """Put new content, written `beside`, in the place of a file or folder, or of none; a link is replaced, not followed."""
    if os.path.lexists(target) and (new.is_dir() or (target.is_dir() and not target.is_symlink())):
        target.rename(new.with_name("old"))  # if the next line fails, `beside` restores it
    os.replace(new, target)
    sync(target.parent)


def relink(link: Path, target: Path) -> None:
    """Point a symbolic link to another file or folder, in one step."""
    with beside(link) as new:
        new.symlink_to(os.path.relpath(target, link.parent))
        os.replace(new, link)


def clean_folder(folder: Path, only: str | None = None) -> None:
    """Remove leftovers of killed writers of all targets in a folder, or of the one called `only`.

    After a kill between two renames the old content is restored. Windows cannot rename a locked folder, so that leftovers stay
    there.
    """
    if not folder.is_dir():
        return
    for leftover in sorted(folder.iterdir()):
        found = _LEFTOVER.fullmatch(leftover.name)
        if found is None or only not in (None, found["name"]):
            continue
        if leftover.is_symlink() or not leftover.is_dir():
            remove(leftover)
            continue
        with contextlib.suppress(OSError), _locked(leftover) as dead:  # Timeout is an OSError: its writer lives
            if dead:
                _restore(leftover, folder / found["name"])
                # Renamed first: a writer that has just made it, and has not locked it yet, must not find it half removed.
                remove(leftover.rename(_hidden(folder / found["name"])))


@contextlib.contextmanager
def held(folder: Path, refusal: str) -> Iterator[None]:
    """Lock an existing folder for this process, until the block or the process ends; `LOCK` is in it meanwhile.

    Raises:
        FileExistsError: Another process has locked it; the text is `refusal`.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_locked(folder))
        except Timeout:
            raise FileExistsError(refusal) from None
        if not folder.is_dir():  # the process that had locked it has just removed it
            raise FileExistsError(refusal)
        try:
            yield
        finally:
            remove(folder / LOCK)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Lock a folder; yield False if the file system has no locks.

    Raises:
        Timeout: Another process, or another block of this one, has locked it.
    """
    lock = FileLock(folder / LOCK, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        raise
    except (OSError, NotImplementedError):  # no locks, or no such folder any more
        pass
    try:
        yield lock.is_locked
    finally:
        lock.release()


def _enter(stack: contextlib.ExitStack, target: Path) -> Path:
    """Make the hidden folder of a writer and lock it, until the stack is closed."""
    while True:
        room = _hidden(target)
        room.mkdir()
        stack.callback(remove, room)
        with contextlib.suppress(Timeout):  # a cleaning process was faster, and removes it
            stack.enter_context(_locked(room))
            if room.exists():
                return room


def _hidden(target: Path) -> Path:
    return target.parent / f".{target.name}.pmss-tmp-{secrets.token_hex(6)}"


def _restore(room: Path, target: Path) -> None:
    """Move the old content back after a failure between the two renames of `put`."""
    if os.path.lexists(room / "old") and not os.path.lexists(target):
        (room / "old").rename(target)


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
