"""Refuse unreadable paths before they are opened."""

from __future__ import annotations

from pathlib import Path

_POINTER = b"version https://git-lfs"


def refuse_unreadable(file: Path) -> None:
    """Refuse a path without a file that this process may read.

    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: It is a folder, a pipe, a device, or the pointer that Git LFS leaves in the place of a file.
        PermissionError: The file exists and this process must not read it.
    """
    if file.is_dir():
        raise ValueError(f"{file} is a folder, and a file is expected there. Give the path of the file.")
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist.")
    if not file.is_file():  # opening a pipe would wait for its writer
        raise ValueError(f"{file} is a pipe or a device, and a file is expected there. Give the path of the file.")
    try:
        with file.open("rb") as stream:
            begins = stream.read(len(_POINTER))
    except PermissionError as error:
        mode = file.stat().st_mode & 0o777
        raise PermissionError(
            f"{file} cannot be read: permission denied (its mode is {mode:03o}). Type `chmod u+r {file}`, or run as the user"
            " who owns it."
        ) from error
    if begins == _POINTER:
        raise ValueError(
            f"{file} is a pointer of Git LFS and not the file itself. Type `git lfs pull` in its repository."
        )
