"""Checks of arguments, with what to type instead."""

from __future__ import annotations

from collections.abc import Sequence


def check_int(owner: str, name: str, value: int | None, least: int, *, optional: bool = False) -> None:
    """Raise ``ValueError`` unless ``value`` is an integer of at least ``least`` (or None where ``optional``)."""
    if value is None and optional:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        kind = f"an integer of at least {least}" + (" or null" if optional else "")
        raise ValueError(f"`{owner}({name}={value!r})`: give {kind}, for example --data.{name} {max(least, 1)}.")


def check_choice(owner: str, name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        told = " or ".join(f"--data.{name} {choice}" for choice in choices)
        raise ValueError(f"`{owner}({name}={value!r})`: give {told}.")
