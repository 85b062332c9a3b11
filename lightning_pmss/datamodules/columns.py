"""Columns
=======

Which columns a published format has, and that no column which says something is passed over: a format is known by the
columns that it needs, and what else is filled in a row must be known to say nothing, or is an error.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_BOOKKEEPING = frozenset(
    ("id", "idx", "index", "uid", "uuid", "unique_id", "source", "split", "__index_level_0__", "Unnamed: 0")
)
"""Columns that tell rows apart, or where they are from, in data of any format."""

# Layouts that people have and that no format here is, by the columns that they are known by.
_FOREIGN = {
    ("messages",): "chat messages (a list of role and content)",
    ("conversations",): "ShareGPT conversations (a list of from and value)",
    ("prompt", "completion"): "prompts and completions",
    ("prompt", "chosen", "rejected"): "preferences",
    ("instruction", "output"): "Alpaca rows",
    ("text",): "plain texts",
}


def filled(value: Any) -> bool:
    """Return whether a value says something: null, NaN, blank texts and containers of nothing else do not."""
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
        name: the format, for messages.
        needs: columns that are read, and by which the format is known.
        reads: columns that are read where they are there.
        silent: columns of the published files that say nothing to train on, besides those that tell rows apart.

    """

    name: str
    needs: tuple[str, ...]
    reads: tuple[str, ...] = ()
    silent: tuple[str, ...] = ()

    def check(self, where: str, row: Any, ignored: Sequence[str] = (), inside: str = "") -> Mapping[str, Any]:
        """Return ``row`` if it has all columns of this format and no other one is filled.

        Args:
            where: the row's place.
            row: the row.
            ignored: columns that are left out on purpose; those of a column that is an object with its name in front
                (``answer.unit``).
            inside: the column that ``row`` is an object in, with a dot behind it.

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
        """Return the filled columns of ``row`` that this format does not read and that may say something."""
        known = {*self.needs, *self.reads, *self.silent, *_BOOKKEEPING}
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
                    f"These look like {layout}: write them into these columns, or read them in a data module of your own"
                    " (examples/custom_task.py)."
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
    """Return the format that a row has: of those whose columns are all there and filled the one that leaves least unused.

    Args:
        formats: the formats; of equally good ones the first counts. Where none fits, the one that lacks least.
        row: a row, perhaps no mapping.
        ignored: columns that are left out on purpose.

    """
    if not isinstance(row, Mapping):
        return formats[-1]
    fitting = [format for format in formats if format.fits(row, ignored)]
    if fitting:
        return min(fitting, key=lambda format: len(format.unused(row, ignored)))
    # None fits: the one that `check` should say what is missing of.
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
