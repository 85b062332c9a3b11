"""Predictions files: JSON lines, one object per example."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning_pmss.disk import atomic_file

NEEDED = ("id", "prompt", "output")


def read_records(path: str | os.PathLike[str], *, unfinished: bool = False) -> list[dict[str, Any]]:
    """Read a predictions file.

    Args:
        path: The file.
        unfinished: The writing may have been killed: a last line without its end is left out.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no predictions file; names the line.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(
            f"There is no file {str(path)!r}. `test` writes predictions-test.jsonl into its log folder, or into "
            "--model.predictions_dir."
        )
    lines = file.read_bytes().split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    elif unfinished:
        lines.pop()  # each line is written with its end in one go: this one was cut off
    rows: list[dict[str, Any]] = []
    seen: dict[Any, int] = {}
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line.decode("utf-8"))
        except ValueError as error:
            raise ValueError(
                f"{path} line {number} is not JSON ({error}). Remove that line and run `test` again: what is there is kept."
            ) from None
        if not isinstance(row, dict) or (missing := [key for key in NEEDED if key not in row]):
            lacks = f"lacks {', '.join(missing)}" if isinstance(row, dict) else "is no object"
            raise ValueError(
                f"{path} line {number} {lacks}; give a predictions file as `test` writes it, with {', '.join(NEEDED)} "
                "in each line."
            )
        if row["id"] in seen:
            raise ValueError(f"{path} line {number} has the id {row['id']!r} of line {seen[row['id']]}; remove one.")
        seen[row["id"]] = number
        rows.append(row)
    return rows


def to_line(row: Mapping[str, Any]) -> str:
    """A row as one line with its end."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def append_records(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Add rows to a file, in one write that is on the disk when this returns: a kill leaves whole lines but for the last."""
    data = "".join(map(to_line, rows)).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_records(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Write one JSON object per line; an earlier file is replaced only by a complete new one."""
    _replace(path, "".join(map(to_line, rows)))


def write_json(value: Any, path: Path) -> None:
    """Write one JSON document; an earlier file is replaced only by a complete new one."""
    _replace(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def _replace(path: Path, text: str) -> None:
    with atomic_file(path) as file:
        file.write(text.encode())
