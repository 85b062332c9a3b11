"""What `PMSSCallback` has put into a checkpoint, looked at before anything of the checkpoint is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_pmss.callbacks.randomness import refuse_damaged_states
from lightning_pmss.reading import Record, checked
from lightning_pmss.reading.checkpoints import DAMAGED


class _Stored(Record):
    """The callback's state; figures and accumulated gradients came later."""

    random_states: list[dict[str, Any]]
    figures: dict[str, float] = {}
    accumulated: dict[str, dict[str, Any]] = {}


def check_stored(key: str, checkpoint: Mapping[str, Any], where: str) -> None:
    """Refuse a damaged state; a checkpoint need not have one.

    Args:
        key: Of the callback in the checkpoint.
        checkpoint: As Lightning has read it.
        where: The checkpoint, for messages.

    Raises:
        ValueError: Something is missing, or is no state of a random generator.
    """
    if (state := checkpoint.get("callbacks", {}).get(key)) is None:
        return
    stored = checked(_Stored, state, where, DAMAGED, under=f"callbacks.{key}")
    for number, states in enumerate(stored.random_states):
        refuse_damaged_states(states, f"{where}, callbacks.{key}.random_states.{number}")
