"""Options with a few allowed values: a dataclass lists the values once, beside the option's default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

_CHOICES = "choices"


def one_of(*values: Any) -> Mapping[str, Any]:
    """Metadata of a dataclass's field that allows these values only (see `check_choices`)."""
    return {_CHOICES: values}


def choices_of(options: Any) -> dict[str, tuple[Any, ...]]:
    """The allowed values of each option that has such a list, from the dataclass or an instance of it."""
    return {option.name: option.metadata[_CHOICES] for option in fields(options) if _CHOICES in option.metadata}


def check_choices(options: Any) -> None:
    """Refuse an instance that has another value.

    Raises:
        ValueError: The message names the option and the allowed values.
    """
    for name, allowed in choices_of(options).items():
        if (value := getattr(options, name)) not in allowed:
            raise ValueError(f"{name}={value!r} is not known; choose one of {list(allowed)}.")
