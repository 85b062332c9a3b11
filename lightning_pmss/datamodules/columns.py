"""Recognise a published format by its columns, and refuse rows with filled columns that nothing reads.

A format is recognised by the columns that it needs. Any other filled column is an error, unless it is known to be irrelevant.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BOOKKEEPING = frozenset(
    ("id", "idx", "index", "uid", "uuid", "unique_id", "source", "split", "__index_level_0__", "Unnamed: 0")
)
"""Columns that tell rows apart, or where they are from, in data of any format."""

# Common layouts that no format here reads, by their characteristic columns.
_FOREIGN = {
    ("messages",): "chat messages (a list of role and content)",
    ("conversations",): "ShareGPT conversations (a list of from and value)",
    ("prompt", "completion"): "prompts and completions",
    ("prompt", "chosen", "rejected"): "preferences",
    ("instruction", "output"): "Alpaca rows",
    ("text",): "plain texts",
}


def filled(value: Any) -> bool:
    """Return whether a value is filled: not null, NaN, a blank text, or a container of such values alone."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return False
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, Mapping):
        return any(filled(each) for each in value.values())
    if isinstance(value, Collection) and not isinstance(value, bytes):
        return any(filled(each) for each in value)
    return True


@dataclass(frozen=True)
class Format:
    """The columns of a published format.

    Args:
        name: The format, for messages.
        needs: Columns that are read and identify the format.
        reads: Further columns that are read if present.
        silent: Columns of the published files that are irrelevant for training, besides those that identify rows.
    """

    name: str
    needs: tuple[str, ...]
    reads: tuple[str, ...] = ()
    silent: tuple[str, ...] = ()

    def check(self, where: str, row: Any, ignored: Sequence[str] = (), inside: str = "") -> Mapping[str, Any]:
        """Return ``row`` if it has all columns of this format and no other column is filled.

        Args:
            where: The row's place.
            row: The row.
            ignored: Columns that are ignored on purpose; those of a column that is an object with its name in front
                (``answer.unit``).
            inside: The column that contains ``row`` as an object, with a dot behind it.

        Raises:
            ValueError: If not; the message names the place, the columns, and what to type.
        """
        if not isinstance(row, Mapping):
            raise ValueError(
                f"{where}: expected a JSON object with {' and '.join(self.needs)}, got {type(row).__name__}."
            )
        missing = [name for name in self.needs if name not in row or inside + name in ignored]
        if missing:
            raise ValueError(self._missing(where, row, missing, ignored, inside))
        unused = self.unused(row, ignored, inside)
        if unused:
            names = " and ".join(repr(inside + name) for name in unused)
            one = len(unused) == 1
            raise ValueError(
                f"{where}: the column{'' if one else 's'} {names} {'is' if one else 'are'} filled"
                f" ({str(row[unused[0]])[:40]!r}), and {self.name} reads {' and '.join(map(repr, self.needs))} alone."
                f" Put what {'it says' if one else 'they say'} into these columns, or leave {'it' if one else 'them'} out"
                f" on purpose: --data.ignore_columns '[{', '.join(inside + name for name in unused)}]'."
            )
        return row

    def unused(self, row: Mapping[str, Any], ignored: Sequence[str] = (), inside: str = "") -> list[str]:
        """Return the filled columns of ``row`` that this format does not read and that may be relevant."""
        known = {*self.needs, *self.reads, *self.silent, *BOOKKEEPING}
        return [
            str(name)
            for name, value in row.items()
            if name not in known and inside + str(name) not in ignored and filled(value)
        ]

    def fits(self, row: Mapping[str, Any], ignored: Sequence[str] = ()) -> bool:
        """Return whether ``row`` has all columns of this format, none of them left out or empty."""
        return all(name not in ignored and filled(row.get(name)) for name in self.needs)

    def _missing(
        self, where: str, row: Mapping[str, Any], missing: list[str], ignored: Sequence[str], inside: str
    ) -> str:
        spelt = {str(name).strip().casefold(): str(name) for name in row}
        hints = [
            f"Rename {spelt[name.casefold()]!r} to {name!r}."
            for name in missing
            if name.casefold() in spelt and name not in row
        ]
        hints += [f"It is in ignore_columns: take {name!r} out." for name in missing if inside + name in ignored]
        if not hints:
            layout = next((told for names, told in _FOREIGN.items() if all(name in row for name in names)), None)
            hints = (
                []
                if layout is None
                else [
                    f"These look like {layout}: read them with --data ChatDataModule, or write them into these columns (or"
                    " examples/custom_task.py)."
                ]
            )
        return " ".join(
            (
                f"{where}: no column {' and '.join(map(repr, missing))}; found {sorted(map(str, row))}. {self.name}'s columns"
                f" are {' and '.join(map(repr, self.needs))}.",
                *hints,
            )
        )


def recognise(formats: Sequence[Format], row: Any, ignored: Sequence[str] = ()) -> Format:
    """Return the format of a row: among the complete ones (all columns there and filled) the one with fewest unused columns.

    Args:
        formats: The formats; of equally good ones the first is used. If none fits, the one that lacks fewest columns.
        row: A row, perhaps no mapping.
        ignored: Columns that are ignored on purpose.
    """
    if not isinstance(row, Mapping):
        return formats[-1]
    fitting = [format for format in formats if format.fits(row, ignored)]
    if fitting:
        return min(fitting, key=lambda format: len(format.unused(row, ignored)))
    # None fits: `check` reports the missing columns of the nearest one.
    return max(reversed(formats), key=lambda format: sum(name in row for name in format.needs) / len(format.needs))


def text(where: str, row: Mapping[str, Any], column: str) -> str:
    """Return the text in ``column``, as it is.

    Raises:
        ValueError: If it is not a text, or blank.
    """
    value = row[column]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: the {column} is {value!r}; it must be a text that is not empty.")
    return value
