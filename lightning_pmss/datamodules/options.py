"""Check arguments; errors say what to type instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

KIND = "kind"
"""Value of ``train_limit_by`` in modules of questions and answers, whose examples have a kind of their own."""


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


def check_instruction_options(owner: str, styles: Sequence[str], few_shot: bool, given: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` unless the arguments of an ``InstructionDataModule`` are in their ranges and go together.

    Args:
        owner: Name of the class, for messages.
        styles: Its prompt styles.
        few_shot: Whether its protocol has worked examples.
        given: Its arguments by name.
    """
    for name in ("batch_size", "max_length", "seed", "val_size", "num_workers", "num_shots"):
        check_int(owner, name, given[name], {"batch_size": 1, "max_length": 2}.get(name, 0))
    for name in ("eval_batch_size", "train_limit", "val_limit", "test_limit"):
        check_int(owner, name, given[name], 1, optional=True)
    check_int(owner, "split_seed", given["split_seed"], 0, optional=True)
    if given["train_limit_by"] not in (None, KIND):
        raise ValueError(
            f"`{owner}(train_limit_by={given['train_limit_by']!r})`: give --data.train_limit_by {KIND}, or null to choose at"
            " random."
        )
    check_choice(owner, "prompt_style", given["prompt_style"], ("plain", *styles, "chat"))
    check_choice(owner, "loss_on", given["loss_on"], ("response", "all"))
    check_choice(owner, "too_long", given["too_long"], ("drop", "cut_prompt", "error"))
    if given["num_shots"] and not few_shot:
        raise ValueError(f"`{owner}(num_shots={given['num_shots']})`: its protocol has no worked examples; give 0.")
    if (given["prompt_style"], given["too_long"]) == ("chat", "cut_prompt"):
        raise ValueError(
            f"`{owner}`: cutting the beginning of a chat would cut its template; with --data.prompt_style chat give"
            " --data.too_long drop or a larger --data.max_length."
        )
