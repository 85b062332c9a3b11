"""Score one example for its record."""

from __future__ import annotations

from typing import Any

from lightning_pmss.metrics.base import text_metric


def examine(metric: Any, output: str, target: Any) -> dict[str, Any]:
    """Score one example and read its answers, as a record contains them.

    Args:
        metric: A `TextMetric`, another object with ``score`` (see `text_metric`), or None.
        output: The generated text.
        target: The gold target; falsy if there is none.

    Returns:
        A dict with the keys extracted, gold, score and correct, all None without metric or target. Further scores of the
        metric follow under their names, and ``group`` is the task of a multiple-choice target.
    """
    if metric is None or not target:
        return {"extracted": None, "gold": None, "score": None, "correct": None}
    asked = text_metric(metric)
    extracted, gold = asked.answers(output, target)
    scores = asked.scores(output, target)
    choice = asked.choice(target)
    group = {} if choice is None else {"group": choice.task}
    return {
        **group,
        "extracted": _plain(extracted),
        "gold": _plain(gold),
        **scores,
        "correct": scores["score"] >= 1,
    }


def _plain(value: Any) -> Any:
    """Return the value if JSON has a type for it, else its text (a fraction's, for instance)."""
    kept = value is None or isinstance(value, bool | int | float | str | list | tuple | dict)
    return value if kept else str(value)
