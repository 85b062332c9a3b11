"""Options of a tool that are fields of a dataclass: their texts, types, choices and defaults are the dataclass's own."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, get_type_hints

from lightning_pmss.methods.choices import choices_of
from lightning_pmss.methods.documentation import option_texts


@dataclass(frozen=True)
class Options:
    """Some options of a dataclass, as a command line has them: ``rank_pattern`` is ``--rank-pattern``.

    Args:
        owner: The dataclass, with an ``Args`` section.
        names: Which of its options.
    """

    owner: Any
    names: Collection[str]

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        """Add the options in the order of the dataclass."""
        types, texts, choices = get_type_hints(self.owner), option_texts(self.owner), choices_of(self.owner)
        for option in fields(self.owner):
            if option.name not in self.names:
                continue
            words: dict[str, Any] = dict(_WORDS[types[option.name]])
            if option.name in choices:
                words["choices"] = [value for value in choices[option.name] if value is not None]
            required = option.default is MISSING and option.default_factory is MISSING
            text = f"{texts[option.name]}{_default(option)}".replace("%", "%%")
            parser.add_argument(flag(option.name), required=required, default=argparse.SUPPRESS, help=text, **words)

    def take(self, given: dict[str, Any]) -> dict[str, Any]:
        """Move the options that were typed out of the parsed ones.

        Returns:
            Arguments of the dataclass, which has the defaults of all others.

        Raises:
            ValueError: An entry of a mapping is no ``NAME=NUMBER``.
        """
        types = get_type_hints(self.owner)
        typed = {name: given.pop(name) for name in self.names if name in given}
        return {name: _MEANINGS.get(types[name], _same)(name, value) for name, value in typed.items()}


def refuse_others(method: str, typed: Collection[str], known: Collection[str]) -> None:
    """Refuse typed options that the configuration of a method does not have.

    Raises:
        ValueError: There are some.
    """
    if odd := [flag(name) for name in typed if name not in known]:
        raise ValueError(f"{', '.join(odd)}: not an option of --method {method}. Leave it out.")


def flag(name: str) -> str:
    """An option as it is typed."""
    return f"--{name.replace('_', '-')}"


def _default(option: Field[Any]) -> str:
    """The default, for the end of the text; of None the text itself says the meaning."""
    value = option.default if option.default_factory is MISSING else option.default_factory()
    if value is MISSING or value is None:
        return ""
    if isinstance(value, bool):
        return f" (default: {'yes' if value else 'no'})"
    return f" (default: {value if value or isinstance(value, int | float) else 'none'})"


def _same(name: str, value: Any) -> Any:
    return value


def _patterns(name: str, words: list[str]) -> str | list[str]:
    """A lone word that is no plain name is a regular expression, several words are names."""
    if len(words) > 1 or words != ["all-linear"] and re.fullmatch(r"[\w.]+", words[0]):
        return words
    return words[0]


def _numbers(name: str, entries: list[str]) -> dict[str, int]:
    """The mapping that several ``NAME=NUMBER`` mean."""
    found = {}
    for entry in entries:
        key, _, number = entry.rpartition("=")
        if not key or not number.isdecimal():
            raise ValueError(f"{flag(name)} {entry!r} is not NAME=RANK; type it as v_proj=128.")
        found[key] = int(number)
    return found


# By the type of a field: how the parser reads its words, and the value that they mean.
_WORDS: Mapping[Any, Mapping[str, Any]] = {
    int: {"type": int},
    float: {"type": float},
    str: {},
    str | None: {},
    bool: {"action": argparse.BooleanOptionalAction},
    str | Sequence[str]: {"nargs": "+", "metavar": "NAME"},
    Sequence[str]: {"nargs": "+", "action": "extend"},
    Mapping[str, int]: {"nargs": "+", "metavar": "NAME=RANK"},
}
_MEANINGS: Mapping[Any, Callable[[str, Any], Any]] = {str | Sequence[str]: _patterns, Mapping[str, int]: _numbers}
