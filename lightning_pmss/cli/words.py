"""Words of a tool's command line, as `PMSSConfig` has them."""

from __future__ import annotations

import re


def patterns(words: list[str]) -> str | list[str]:
    """Words of the command line as the config has them: a lone word that is no plain name is a regular expression."""
    if len(words) > 1 or words != ["all-linear"] and re.fullmatch(r"[\w.]+", words[0]):
        return words
    return words[0]


def rank_entry(entry: str) -> tuple[str, int]:
    """``NAME=RANK`` as name and number.

    Raises:
        ValueError: It is something else.
    """
    name, _, rank = entry.rpartition("=")
    if not name or not rank.isdecimal():
        raise ValueError(f"--rank-pattern {entry!r} is not NAME=RANK; type it as v_proj=128.")
    return name, int(rank)
