"""The pictures of a search, as SVG text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_pmss.inspect.pictures import new_figure, safe_label, svg_text
from lightning_pmss.search.records import Line
from lightning_pmss.search.space import METHOD, Space

_INK, _BEST, _FAR = "#1f4e79", "#b23a48", "#9dbbd6"


def history(trials: Sequence[Line], monitor: str, mode: str, untrained: float | None) -> str:
    """Draw the early score of each trial by number, the best one so far, and the untrained model's."""
    figure = new_figure()
    axes = figure.add_subplot()
    scored = [(line.number, line.early) for line in trials if line.early is not None]
    numbers, scores = zip(*scored, strict=True)
    better = min if mode == "min" else max
    axes.plot(numbers, scores, "o", color=_FAR, markersize=5, label="trial, at the fraction")
    axes.step(
        numbers, [better(scores[: i + 1]) for i in range(len(scores))], where="post", color=_INK, label="best so far"
    )
    ends = [(line.number, line.final) for line in trials if line.final is not None and line.final != line.early]
    if ends:
        axes.plot(*zip(*ends, strict=True), "s", color=_BEST, markersize=5, label="at the end")
    if untrained is not None:
        axes.axhline(untrained, color="#5b6b7b", linestyle=":", label="untrained model")
    axes.set_xlabel("trial")
    axes.set_ylabel(safe_label(monitor))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    return svg_text(figure)


def scatter(trials: Sequence[Line], monitor: str) -> str:
    """Draw final scores against early ones, one colour per method."""
    figure = new_figure(height=4.0)
    axes = figure.add_subplot()
    both = [line for line in trials if line.early is not None and line.final is not None]
    for method in dict.fromkeys(line.method for line in both):
        points = [(line.early, line.final) for line in both if line.method == method]
        axes.plot(*zip(*points, strict=True), "o", markersize=5, label=safe_label(str(method)))
    for line in both:
        axes.annotate(str(line.number), (line.early, line.final), xytext=(4, 3), textcoords="offset points", fontsize=7)
    axes.set_xlabel(safe_label(f"{monitor} at the fraction"))
    axes.set_ylabel(safe_label(f"{monitor} at the end"))
    axes.grid(alpha=0.3)
    if len({line.method for line in both}) > 1:
        axes.legend(frameon=False, fontsize=8)
    return svg_text(figure)


def parallel(trials: Sequence[Line], names: Sequence[str], space: Space, monitor: str, mode: str) -> str:
    """Draw a line for each trial across one axis per parameter and one for the score; dark ones are the better ones.

    Args:
        trials: Trials that have all of the parameters.
        names: The parameters.
        space: The search space.
        monitor: Name of the score.
        mode: ``min`` or ``max``.
    """
    scored = [line for line in trials if line.early is not None]
    figure = new_figure(width=1.8 * (len(names) + 1) + 1, height=3.6)
    axes = figure.add_subplot()
    columns = [_Axis([line.params[name] for line in scored], log=space.is_log(name)) for name in names]
    columns.append(_Axis([line.early for line in scored], log=False))
    order = sorted(range(len(scored)), key=lambda i: (scored[i].early or 0.0) * (1 if mode == "min" else -1))
    for rank, index in reversed(list(enumerate(order))):
        share = rank / max(1, len(order) - 1)
        heights = [column.places[index] for column in columns]
        color = _BEST if rank == 0 else _INK
        axes.plot(range(len(columns)), heights, color=color, alpha=1.0 - 0.85 * share, linewidth=1.6 - share)
    for place, column in enumerate(columns):
        axes.axvline(place, color="#5b6b7b", linewidth=0.8)
        for height, text in column.ticks:
            axes.annotate(safe_label(text), (place, height), xytext=(4, 0), textcoords="offset points", fontsize=7)
    titles = [name.rpartition(": ")[2] for name in names] + [monitor]
    axes.set_xticks(range(len(columns)), [safe_label(text) for text in titles], fontsize=8, rotation=12)
    axes.set_yticks([])
    axes.set_xlim(-0.2, len(columns) - 0.4)
    axes.spines[:].set_visible(False)
    return svg_text(figure)


def importances(values: Mapping[str, float]) -> str:
    """Draw a bar for each parameter."""
    ordered = sorted(values.items(), key=lambda item: item[1])
    figure = new_figure(height=0.9 + 0.3 * len(ordered))
    axes = figure.add_subplot()
    axes.barh([safe_label(name) for name, _ in ordered], [value for _, value in ordered], color=_INK)
    axes.set_xlabel("share")
    axes.set_xlim(0, 1)
    return svg_text(figure)


class _Axis:
    """Places of values on an axis of height 1, and its ticks."""

    def __init__(self, values: Sequence[Any], *, log: bool) -> None:
        import numpy as np

        if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            numbers = np.log(np.array(values, float)) if log else np.array(values, float)
            low, high = float(numbers.min()), float(numbers.max())
            width = high - low or 1.0
            self.places = [float((number - low) / width) for number in numbers]
            ends = [(0.0, min(values))] if low == high else [(0.0, min(values)), (1.0, max(values))]
            self.ticks = [(height, f"{value:.4g}") for height, value in ends]
        else:
            kinds = sorted(set(map(str, values)))
            step = 1 / max(1, len(kinds) - 1)
            self.places = [kinds.index(str(value)) * step for value in values]
            self.ticks = [(place * step, kind) for place, kind in enumerate(kinds)]


def names_for(trials: Sequence[Line], space: Space, method: str | None) -> list[str]:
    """Return the parameters that all trials of a method have; of None, those of all trials."""
    names = space.names_of(None) + ([] if method is None else space.names_of(method))
    return [name for name in names if name != METHOD or method is None]
