"""Check the arguments of `ChatDataModule`; errors say what to type instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_pmss.datamodules.conversations.formats import COLUMNS
from lightning_pmss.datamodules.options import check_choice, check_int

PLAIN = "plain"
"""The template that joins prompt and completion as they are."""
_ROLES = ("system", "user", "assistant", "tool")


def check_chat_options(owner: str, given: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` unless the arguments are in their ranges.

    Args:
        owner: Name of the class, for messages.
        given: Its arguments by name.
    """
    least = {"batch_size": 1, "max_length": 2, "seed": 0, "num_workers": 0}
    for name, smallest in least.items():
        if name in given:
            check_int(owner, name, given[name], smallest)
    for name in ("eval_batch_size", "train_limit", "val_limit", "test_limit"):
        check_int(owner, name, given.get(name), 1, optional=True)
    check_int(owner, "split_seed", given.get("split_seed"), 0, optional=True)
    check_choice(owner, "train_on", given["train_on"], ("assistant", "last", "each", "all"))
    check_choice(owner, "on_bad_row", given["on_bad_row"], ("error", "skip"))
    check_choice(owner, "too_long", given["too_long"], ("drop", "cut_turns", "error"))
    size = given["val_size"]
    if (
        isinstance(size, bool)
        or not isinstance(size, (int, float))
        or size < 0
        or isinstance(size, float)
        and size >= 1
    ):
        raise ValueError(
            f"`{owner}(val_size={size!r})`: give a number of conversations or a share below 1, such as --data.val_size 0.05."
        )
    if unknown := sorted(set(given["columns"] or {}) - set(COLUMNS)):
        raise ValueError(
            f"`{owner}(columns)`: {unknown[0]!r} is no column of ours; give ours first and your file's second, for example"
            f" --data.columns '{{instruction: {unknown[0]}}}'. Ours are {', '.join(COLUMNS)}."
        )
    for name, role in (given["roles"] or {}).items():
        if role not in _ROLES:
            raise ValueError(f"`{owner}(roles)`: {name!r} is {role!r}; give one of {', '.join(_ROLES)}.")
