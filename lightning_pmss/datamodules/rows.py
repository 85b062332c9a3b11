"""Read rows of data sets from JSONL, JSON, parquet and CSV files or the hub, each with its place for errors."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = tuple[str, Any]
"""Where the row is ("FILE:LINE", "FILE row N"), and the row: in good data a mapping."""

OnBad = Callable[[ValueError], None] | None
"""Gets what is wrong with a line that cannot be read, in place of its being raised."""

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")


class _Repeated(Exception):
    """A JSON object has a key more than once: all but the last value would be lost."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _Repeated(next(key for key in keys if keys.count(key) > 1))
    return found


def _loads(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except _Repeated as error:
        raise ValueError(f"{where}: an object has the key {str(error)!r} more than once; keep one of them.") from None
    except json.JSONDecodeError:
        raise
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{where}: JSON that Python does not read ({error}). Correct it or take it out.") from error


def _decode(raw: bytes, where: str, encoding: str) -> str:
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: not UTF-8 (byte 0x{raw[error.start]:02x} at position {error.start + 1} of the line)."
            " Save the file as UTF-8."
        ) from error


def read_jsonl_rows(path: Path, on_bad: OnBad = None) -> Iterator[Row]:
    """Yield the objects of a JSONL file. Empty lines are skipped.

    Args:
        path: The file.
        on_bad: Gets the error of a line that is not UTF-8 or not JSON; null: it is raised.

    Raises:
        ValueError: If a line is not UTF-8 or not JSON; the message names file and line.
    """
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            where = f"{path}:{number}"
            try:
                line = _decode(raw, where, "utf-8-sig" if number == 1 else "utf-8").strip()
                if line:
                    row = _line(line, where)
            except ValueError as error:
                if on_bad is None:
                    raise
                on_bad(error)
                continue
            if line:
                yield where, row


def _line(line: str, where: str) -> Any:
    try:
        return _loads(line, where)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}: not valid JSON ({error.msg} at column {error.colno}). Each line must be one whole JSON"
            " object; a file with one list of all rows is to be named .json."
        ) from error


def read_csv_rows(path: Path, on_bad: OnBad = None) -> Iterator[Row]:
    """Yield the rows of a CSV file with a header as objects of texts; an empty cell is an empty text.

    Args:
        path: The file, commas between cells.
        on_bad: Gets the error of a row that has other cells than the header; null: it is raised.

    Raises:
        ValueError: If it is not UTF-8, has no header, or a row has other cells; the message names file and line.
    """
    raw = path.read_bytes()
    for number, part in enumerate(raw.split(b"\n"), start=1):
        _decode(part, f"{path}:{number}", "utf-8")
    reader = csv.reader(io.StringIO(raw.decode("utf-8-sig"), newline=""), strict=True)
    rows = _cells(reader)
    line = 1
    try:
        header = next(rows, [])
        if header[:1] == [""]:  # an index without a name, as pandas writes it
            header[0] = "Unnamed: 0"
        if len(set(header)) < len(header) or not all(name.strip() for name in header):
            raise ValueError(
                f"{path}:1: the header {header} has a name twice or an empty one; give each column a name."
            )
        if len(header) == 1 and (mark := next((mark for mark in ";\t|" if mark in header[0]), None)):
            raise ValueError(
                f"{path}:1: the header {header} has {mark!r} between its cells; save the file with commas."
            )
        line = reader.line_num + 1
        for cells in rows:
            where, line = f"{path}:{line}", reader.line_num + 1
            if not cells:
                continue
            if len(cells) == len(header):
                yield where, dict(zip(header, cells, strict=True))
                continue
            error = ValueError(
                f"{where}: {len(cells)} cells, and the header has {len(header)}; quote texts that have commas."
            )
            if on_bad is None:
                raise error
            on_bad(error)
    except csv.Error as error:
        raise ValueError(
            f"{path}:{line}: not valid CSV ({error}). Put quotes around texts, and double those in them."
        ) from error


def _cells(reader: Iterator[list[str]]) -> Iterator[list[str]]:
    """The rows of a CSV reader, with cells of any size. The limit is one of the process: others get it back at once."""
    while True:
        before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default is 131,072 characters
        try:
            found = next(reader, None)
        finally:
            csv.field_size_limit(before)
        if found is None:
            return
        yield found


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        ValueError: If it is not UTF-8 or not JSON; the message names file and line.
    """
    raw = path.read_bytes()
    for number, line in enumerate(raw.split(b"\n"), start=1):
        _decode(line, f"{path}:{number}", "utf-8")
    try:
        return _loads(raw.decode("utf-8-sig"), str(path))
    except json.JSONDecodeError as error:
        remedy = "Repair or download the file again."
        if error.msg == "Extra data":
            remedy = "If each line is an object of its own, name the file .jsonl."
        raise ValueError(
            f"{path}:{error.lineno}: not valid JSON ({error.msg} at column {error.colno}). {remedy}"
        ) from error


def read_rows(path: Path, on_bad: OnBad = None) -> Iterator[Row]:
    """Yield the rows of a file: JSONL, JSON (a list of objects), parquet or CSV, by its name.

    Args:
        path: The file.
        on_bad: Gets the error of a line of JSONL or CSV that cannot be read; null: it is raised.

    Raises:
        ValueError: If it is not of the format that its name says; the message names file and row.
    """
    if path.suffix == ".parquet":
        yield from _read_parquet(path)
    elif path.suffix == ".csv":
        yield from read_csv_rows(path, on_bad)
    elif path.suffix == ".json":
        rows = read_json(path)
        if not isinstance(rows, list):
            raise ValueError(
                f"{path}: expected a JSON list of rows, got {type(rows).__name__}. Put the rows into one list, [...], or one"
                " object on each line of a file named .jsonl."
            )
        yield from ((f"{path} row {number}", row) for number, row in enumerate(rows))
    else:
        yield from read_jsonl_rows(path, on_bad)


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow.parquet as parquet  # type: ignore[import-untyped]  # comes with `datasets`

    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    yield f"{path} row {number}", row
                    number += 1
    except OSError as error:  # pyarrow's own errors are ValueErrors or OSErrors
        raise ValueError(f"{path}: not a readable parquet file ({error}). Download it again.") from error
    except ValueError as error:
        raise ValueError(f"{path}: not a readable parquet file ({error}). Download it again.") from error


def load_hub_rows(hub_id: str, split: str, options: Sequence[Mapping[str, Any]], remedy: str) -> list[Row]:
    """Return the rows of a split of a hub data set, of several configurations one after the other.

    Args:
        hub_id: Its id.
        split: The split's name on the hub.
        options: Keyword arguments of ``datasets.load_dataset``, one mapping per configuration.
        remedy: What to type to go without the hub.

    Raises:
        ConnectionError: If they cannot be downloaded.
    """
    import datasets

    rows: list[Row] = []
    for keywords in options:
        try:
            part = datasets.load_dataset(hub_id, split=split, **keywords)
        except Exception as error:  # the hub, its cache and the network raise a dozen unrelated classes
            raise ConnectionError(
                f"Could not load {hub_id!r} from the hub ({type(error).__name__}: {error}). Without a connection (or"
                f" with HF_HUB_OFFLINE=1) pass local files: {remedy}"
            ) from error
        rows += [(f"{hub_id} {split} row {len(rows) + number}", row) for number, row in enumerate(part)]
    return rows


def looks_like_file(path: str) -> bool:
    """Return whether ``path`` is meant as a local path rather than as a hub id."""
    return (
        Path(path).suffix in SUFFIXES
        or Path(path).expanduser().exists()
        or Path(path).is_absolute()
        or path.startswith((".", "~"))
    )


def existing(path: Path, remedy: str) -> Path:
    """Return ``path`` if it is a file.

    Raises:
        FileNotFoundError: If not; the message ends in ``remedy``.
    """
    path = path.expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {str(path)!r}. {remedy}")
    return path


def split_file(folder: Path, stems: Sequence[str], remedy: str) -> Path:
    """Return the first file of ``folder`` that is called one of ``stems``, with one of `SUFFIXES`.

    Raises:
        FileNotFoundError: If there is none.
    """
    for stem in stems:
        for suffix in SUFFIXES:
            if (folder / f"{stem}{suffix}").is_file():
                return folder / f"{stem}{suffix}"
    return existing(folder / f"{stems[0]}{SUFFIXES[0]}", remedy)
