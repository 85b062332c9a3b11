"""What the accuracies of generated texts have in common: counts that are summed over ranks, and checked input."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override


def check_pairs(preds: Any, targets: Any) -> None:
    """Raise unless both are lists of the same length.

    Raises:
        TypeError: If one of them is a single text.
        ValueError: If they differ in length.

    """
    if isinstance(preds, str) or isinstance(targets, str):
        raise TypeError(
            "`preds` and `targets` are lists, one entry per example; got a single text. Put it into a list."
        )
    if len(preds) != len(targets):
        raise ValueError(f"Got {len(preds)} texts for {len(targets)} targets; give one text per target.")


class OnClassToo:
    """A method that the class has as well: called on it, with the class's own settings."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.__doc__ = function.__doc__

    def __get__(self, instance: Any, owner: type) -> Any:
        return MethodType(self.function, owner if instance is None else instance)


class TextAccuracy(Metric):
    """Share of generated texts that are right; a subclass says what right means in :meth:`score`.

    Args:
        strict: Score by the rule of the literature as published, its known faults included, so that numbers compare.
            ``False``: by the corrected rule of the subclass.

    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    correct: Tensor
    total: Tensor

    def __init__(self, strict: bool = True) -> None:
        super().__init__()
        self.strict = strict
        self.add_state("correct", default=torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", default=torch.tensor(0), dist_reduce_fx="sum")

    @abstractmethod
    def score(self, pred: str, target: str) -> float:
        """Return 1.0 if ``pred`` answers as ``target`` does, else 0.0."""

    @override
    def update(self, preds: Sequence[str], targets: Sequence[str]) -> None:
        """Count a batch of generated texts against their gold answers."""
        check_pairs(preds, targets)
        self.correct += int(sum(self.score(pred, target) for pred, target in zip(preds, targets, strict=True)))
        self.total += len(preds)

    @override
    def compute(self) -> Tensor:
        """Return the accuracy over all texts and ranks, a float32 scalar in 0-1."""
        if self.total == 0:
            raise ValueError(f"`{type(self).__name__}` has seen no example; call `update` before `compute`.")
        return self.correct.float() / self.total
