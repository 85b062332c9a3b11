"""What a metric says of one example: its scores, the answer that it reads in the text, and the gold one."""

from __future__ import annotations

import inspect
from typing import Any


def examine(metric: Any, output: str, target: Any) -> dict[str, Any]:
    """Scores and answers of one example, as a record holds them.

    ``score`` is ``metric.score(output, target)``, and each other method ``score_<name>(output, target)`` gives a score of
    that name. ``extracted`` and ``gold`` are what the methods ``extract`` and ``gold`` give, where the metric has them;
    ``group`` is the task, where ``gold`` names one.

    Args:
        metric: None, or an object with ``score``.
        output: The text.
        target: What it is scored against; falsy where there is nothing.

    Returns:
        A dict with the keys extracted, gold, score and correct, all None where nothing can be scored; perhaps more.
    """
    if metric is None or not target:
        return {"extracted": None, "gold": None, "score": None, "correct": None}
    gold, group, labels = _gold(metric, target)
    scores = {"score": float(metric.score(output, target))}
    for name in sorted(name for name in dir(metric) if name.startswith("score_")):
        scores[name] = float(getattr(metric, name)(output, target))
    found = {"extracted": _extracted(metric, output, labels), "gold": gold, **scores, "correct": scores["score"] >= 1}
    return found if group is None else {"group": group, **found}


def labels_of(metric: Any, target: Any) -> tuple[str, str, tuple[str, ...]] | None:
    """Task, right label and all labels of a target, None where the metric knows of no labels."""
    gold = metric.gold(target) if hasattr(metric, "gold") else None
    return gold if isinstance(gold, tuple) and len(gold) == 3 else None


def _gold(metric: Any, target: Any) -> tuple[Any, str | None, tuple[str, ...] | None]:
    if (labelled := labels_of(metric, target)) is not None:
        return labelled[1], labelled[0], labelled[2]
    if hasattr(metric, "gold"):
        return _plain(metric.gold(target)), None, None
    if isinstance(target, str) and hasattr(metric, "extract"):
        return _plain(metric.extract(target)), None, None
    return target, None, None


def _extracted(metric: Any, output: str, labels: tuple[str, ...] | None) -> Any:
    if not hasattr(metric, "extract"):
        return output
    if labels is not None and len(inspect.signature(metric.extract).parameters) > 1:
        return _plain(metric.extract(output, labels))
    return _plain(metric.extract(output))


def _plain(value: Any) -> Any:
    """What JSON has no type for (a fraction) as text."""
    return value if value is None or isinstance(value, bool | int | float | str | list) else str(value)
