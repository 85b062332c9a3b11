"""Docstrings of classes that have the options of others: each option is written once, and shown wherever it can be given."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T", bound=type)
_ARGS = re.compile(r"\n    Args:\n(.*?)(?=\n    \w+:\n|\Z)", re.DOTALL)
_ENTRY = re.compile(r"^        (\w+): .*?(?=^        \w+: |\Z)", re.DOTALL | re.MULTILINE)


def inherit_options(*owners: type) -> Callable[[T], T]:
    """Complete the ``Args`` section of a class by those options of other classes that it does not describe itself.

    Args:
        owners: Classes with Google docstrings; of two that describe an option the later one is used.
    """

    def complete(cls: T) -> T:
        entries: dict[str, str] = {}
        for owner in owners:
            entries |= _entries(owner.__doc__ or "")
        entries |= _entries(cls.__doc__ or "")
        entries.pop("config", None)
        text = "\n    Args:\n" + "".join(f"{entry.rstrip()}\n" for entry in entries.values())
        doc = _ARGS.sub("", cls.__doc__ or "")
        head, mark, tail = doc.partition("\n    Raises:\n")
        cls.__doc__ = f"{head.rstrip()}\n{text}{mark}{tail}"
        return cls

    return complete


def option_texts(owner: type) -> dict[str, str]:
    """The text of each option in the ``Args`` section of a class: on one line, without marks of code."""
    entries = _entries(owner.__doc__ or "")
    return {name: " ".join(entry.partition(": ")[2].split()).replace("`", "") for name, entry in entries.items()}


def _entries(doc: str) -> dict[str, str]:
    found = _ARGS.search(doc)
    return {} if found is None else {m[1]: m[0] for m in _ENTRY.finditer(found[1] + "\n")}
