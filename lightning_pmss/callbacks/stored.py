"""Check the callback's state in a checkpoint before anything of the checkpoint is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ConfigDict
from torch import Tensor, nn

from lightning_pmss.callbacks.randomness import refuse_damaged_states
from lightning_pmss.checkpoints.reading import DAMAGED
from lightning_pmss.store import Record, checked


class _Stored(Record):
    """The callback's state; earlier versions have no figures and no accumulated gradients."""

    model_config = ConfigDict(extra="ignore")

    random_states: list[dict[str, Any]]
    figures: dict[str, float] = {}
    accumulated: dict[str, dict[str, Any]] = {}


def check_stored(key: str, module: nn.Module, checkpoint: Mapping[str, Any], where: str) -> None:
    """Refuse a damaged state; a checkpoint without one is accepted.

    Args:
        key: Key of the callback in the checkpoint.
        module: The module to train.
        checkpoint: Content of the checkpoint.
        where: The checkpoint, for messages.

    Raises:
        ValueError: A part is missing, a random state is damaged, or a gradient does not fit the module.
    """
    if (state := checkpoint.get("callbacks", {}).get(key)) is None:
        return
    stored = checked(_Stored, state, where, DAMAGED, under=f"callbacks.{key}")
    for number, states in enumerate(stored.random_states):
        refuse_damaged_states(states, f"{where}, callbacks.{key}.random_states.{number}")
    gradients = stored.accumulated.get("gradients", {})
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    if any(
        name not in shapes or not isinstance(value, Tensor) or value.shape != shapes[name]
        for name, value in gradients.items()
    ):
        raise ValueError(f"{where}, callbacks.{key}.accumulated: no gradients of this module's. {DAMAGED}")
