"""Base classes of metrics for generated texts: per example for records, and counts that are summed over ranks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any, NamedTuple, Protocol, runtime_checkable

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
    """A method that can be called on the class as well, with the class's own settings."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.__doc__ = function.__doc__

    def __get__(self, instance: Any, owner: type) -> Any:
        return MethodType(self.function, owner if instance is None else instance)


class Choice(NamedTuple):
    """The target of a multiple-choice question.

    Attributes:
        task: Name of the task, which groups scores.
        label: The right label.
        labels: All labels of the task.
    """

    task: str
    label: str
    labels: tuple[str, ...]


@runtime_checkable
class TextMetric(Protocol):
    """The methods of a metric that an evaluation calls for one example, beside torchmetrics' ``update`` and ``compute``.

    A metric that subclasses it writes `score` and overrides others where the defaults do not fit. A metric that does not
    subclass it is wrapped by `text_metric`.
    """

    @abstractmethod
    def score(self, pred: Any, target: Any, /) -> float:
        """Return the score of one text, in 0-1; 1.0 is right."""
        ...

    def scores(self, pred: Any, target: Any, /) -> dict[str, float]:
        """Return all scores of one text: ``score``, and others under names that begin with ``score_``."""
        return {"score": float(self.score(pred, target))}

    def answers(self, pred: Any, target: Any, /) -> tuple[Any, Any]:
        """Return the answer read in the text, and the gold answer read in the target; by default both as they are."""
        return pred, target

    def choice(self, target: Any, /) -> Choice | None:
        """Return the task and labels of a multiple-choice target; by default None."""
        return None


class ByName(TextMetric):
    """A `TextMetric` from a metric that has ``score`` alone, and perhaps ``score_<name>``, ``extract`` and ``gold``.

    Args:
        metric: An object with ``score(pred, target)``. Each method ``score_<name>(pred, target)`` gives one more score;
            ``extract(text)`` and ``gold(target)`` read the answers.
    """

    def __init__(self, metric: Any) -> None:
        self.metric = metric

    @override
    def score(self, pred: Any, target: Any, /) -> float:
        return self.metric.score(pred, target)

    @override
    def scores(self, pred: Any, target: Any, /) -> dict[str, float]:
        further = sorted(name for name in dir(self.metric) if name.startswith("score_"))
        return {name: float(getattr(self.metric, name)(pred, target)) for name in ("score", *further)}

    @override
    def answers(self, pred: Any, target: Any, /) -> tuple[Any, Any]:
        extract = getattr(self.metric, "extract", None)
        if (gold := getattr(self.metric, "gold", None)) is None:
            gold = extract if isinstance(target, str) else None
        return (pred if extract is None else extract(pred)), (target if gold is None else gold(target))


def text_metric(metric: Any) -> TextMetric:
    """Return the metric itself if it is a `TextMetric`, else `ByName` around it."""
    return metric if isinstance(metric, TextMetric) else ByName(metric)


class TextAccuracy(Metric, TextMetric):
    """Share of generated texts that are right; a subclass defines right in `score`.

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

    def extract(self, text: str) -> Any:
        """Return the answer in a generated text, ``None`` where it contains none; by default the text."""
        return text

    def gold(self, target: str) -> Any:
        """Return the answer in a target; by default as `extract` reads it."""
        return self.extract(target)

    @override
    def answers(self, pred: str, target: str, /) -> tuple[Any, Any]:
        return self.extract(pred), self.gold(target)

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
