"""Read the rows of a split from files or the hub; bad rows are refused, or skipped and counted."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_pmss.datamodules.columns import filled
from lightning_pmss.datamodules.conversations.formats import Kind, Layout, Side
from lightning_pmss.datamodules.conversations.messages import BadRowError
from lightning_pmss.datamodules.rows import SUFFIXES, Row, existing, load_hub_rows, looks_like_file, read_rows
from lightning_pmss.messages import some

STEMS = {"train": ("train",), "val": ("validation", "val", "valid", "dev"), "test": ("test",)}
"""Names of a folder's files, without their suffixes."""


@dataclass
class Rows:
    """The readable rows of a split, in their order.

    Args:
        source: File or hub id and split.
        kind: Their layout; null if there are none.
        wheres: The place of each.
        sides: The texts of each.
        skipped: What is wrong with the rows that are left out.
        kinds: The kind of each, where a column has it.
    """

    source: str
    kind: Kind | None = None
    wheres: list[str] = field(default_factory=list)
    sides: list[list[Side]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)


def read_split(
    source: str, rows: Iterator[Row], layout: Layout, skipped: list[str] | None, kind: str | None = None
) -> Rows:
    """Return the rows of a split.

    Args:
        source: File or hub id and split, for messages.
        rows: The rows with their places.
        layout: Reads them.
        skipped: Where to put what is wrong with bad rows; null: the first one is raised.
        kind: The column that has the kind of each row; null: none.

    Raises:
        ValueError: A row is bad, or none is good; the message has its place.
    """
    found = Rows(source, skipped=[] if skipped is None else skipped)
    for where, row in rows:
        try:
            if found.kind is None:
                found.kind = layout.recognise(where, row)
            sides = layout.read(where, row, found.kind)
            _check_text(where, sides)
            if kind is not None:
                found.kinds.append(_kind(where, row, kind))
        except ValueError as error:
            if skipped is None:
                raise
            skipped.append(str(error))
            continue
        found.wheres.append(where)
        found.sides.append(sides)
    if not found.sides:
        reason = f" All {len(found.skipped)} rows are bad, the first one: {found.skipped[0]}" if found.skipped else ""
        raise ValueError(f"{source}: no examples in this file; it needs one conversation per row.{reason}")
    return found


def _kind(where: str, row: Any, column: str) -> str:
    value = row.get(column)
    if not filled(value) or not isinstance(value, str | int):
        raise BadRowError(
            f"{where}: --data.train_limit_by {column}: the value there is {value!r}; name a column of texts or whole numbers"
            f" that every row has. This row has {some(sorted(map(str, row)))}."
        )
    return str(value)


def _check_text(where: str, sides: list[Side]) -> None:
    try:
        dumped(sides).encode()
    except UnicodeEncodeError as error:
        raise BadRowError(
            f"{where}: a text has {error.object[error.start]!r}, half of a character, which is no text."
        ) from error


def split_rows(
    path: str, split: str, name: str, option: str, skipped: list[str] | None
) -> tuple[str, Iterator[Row]] | None:
    """Return the source and the rows of a split of a file, a folder or a hub data set.

    Args:
        path: File, folder or hub id.
        split: train, val or test.
        name: Name of the split on the hub.
        option: The option that names the path, for messages.
        skipped: Where to put what is wrong with lines that are no JSON; null: it is raised.

    Returns:
        None if a folder has no such split, which train must have.

    Raises:
        FileNotFoundError: If the path looks like a file and is none.
        ConnectionError: If the hub cannot be reached.
    """
    remedy = f"Give --data.{option} a file ({', '.join(SUFFIXES)}), a folder with such files called train, or a hub id."
    if not looks_like_file(path):
        rows = load_hub_rows(path, name, [{}], f"--data.{option} FILE.jsonl; {Path(path).absolute()} is none.")
        return f"{path} {name}", ((where, _cleaned(row)) for where, row in rows)
    place = Path(path).expanduser()
    if place.is_dir():
        files = [place / f"{stem}{suffix}" for stem in STEMS[split] for suffix in SUFFIXES]
        file = next((each for each in files if each.is_file()), None)
        if file is None and split != "train":
            return None
        others = sorted(each.name for each in place.iterdir() if each.suffix in SUFFIXES)
        if file is None and others:
            remedy = f"The folder has {some(others)}: give a file, such as --data.{option} {place / others[0]}, or rename it."
        place = existing(file or files[0], remedy)
    place = existing(place, remedy)
    if place.suffix not in SUFFIXES:
        raise ValueError(
            f"{place}: files are read by their suffix, {', '.join(SUFFIXES)}; rename, unpack or convert this one."
        )
    rows_of = read_rows(place, None if skipped is None else lambda error: skipped.append(str(error)))
    if place.suffix == ".parquet":
        return str(place), ((where, _cleaned(row)) for where, row in rows_of)
    return str(place), rows_of


def _cleaned(row: Any) -> Any:
    return {name: without_nulls(value) for name, value in row.items()} if isinstance(row, Mapping) else row


def without_nulls(value: Any) -> Any:
    """Return a value without the keys that are null: Arrow gives each object the keys of all objects in its column."""
    if isinstance(value, Mapping):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    if isinstance(value, (list, tuple)):
        return [without_nulls(each) for each in value]
    return value


def dumped(sides: list[Side]) -> str:
    """Return the texts of a row as JSON, the form in which they are hashed and passed on."""
    return json.dumps(sides, ensure_ascii=False)
