"""The picture and the page of a study."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import yaml

from lightning_pmss.enough.curve import Curve
from lightning_pmss.enough.plan import Plan
from lightning_pmss.enough.result import Result, number, sentences, table
from lightning_pmss.inspect.page import Section, render
from lightning_pmss.inspect.pictures import new_figure, safe_label, svg_text
from lightning_pmss.messages import one_line
from lightning_pmss.store.disk import atomic_file

PAGE = "enough.html"
PICTURE = "enough.svg"
_RUNS, _MEANS, _CURVE = "#9dbbd6", "#1f4e79", "#b23a48"


def check_library() -> None:
    """Refuse to begin without the library that draws.

    Raises:
        ModuleNotFoundError: It is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError("enough draws with matplotlib: pip install -c constraints.txt -e '.[plots]'")


def draw(result: Result) -> str:
    """Return the scores against the size as SVG text: each run, means with intervals, and the curve."""
    figure = new_figure(height=4.0)
    axes = figure.add_subplot()
    sizes, _, values = zip(*result.scores, strict=True)
    axes.plot(sizes, values, "o", color=_RUNS, markersize=4, label="one run")
    means = [row.score for row in result.rows]
    errors = [mean.half or 0.0 for mean in means]
    at = [row.size for row in result.rows]
    shown = [mean.mean for mean in means]
    axes.errorbar(at, shown, errors, fmt="o", color=_MEANS, capsize=4, label="mean, 95 % interval")
    if isinstance(result.curve, Curve):
        inside = np.geomspace(at[0], at[-1], 200)
        beyond = np.geomspace(at[-1], 2 * at[-1], 50)
        axes.plot(inside, result.sign * result.curve.at(inside), color=_CURVE, label="curve")
        axes.plot(beyond, result.sign * result.curve.at(beyond), color=_CURVE, linestyle=":", label="one doubling more")
        axes.axhspan(*sorted(result.sign * end for end in result.curve.asymptotes), color=_CURVE, alpha=0.08)
        axes.axhline(result.sign * result.curve.asymptote, color=_CURVE, linewidth=0.8, label="with unlimited data")
    axes.set_xscale("log")
    axes.set_xticks(at, [f"{size:,}" for size in at])
    axes.minorticks_off()
    axes.set_xlabel("training examples")
    axes.set_ylabel(safe_label(result.monitor))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    return svg_text(figure)


def write_page(plan: Plan, result: Result) -> Path:
    """Write picture and page into the study's folder.

    Args:
        plan: The study.
        result: Its result, with a score at least.

    Returns:
        Path of the page.
    """
    picture = draw(result)
    with atomic_file(plan.output / PICTURE) as new:
        new.write_text(picture, encoding="utf-8")
    length = f"{plan.steps:,} steps" if plan.equal == "steps" else f"{plan.epochs:,} epochs"
    each = f"Every run has {length}; {plan.drawn}"
    last = result.rows[-1]
    figures = [
        ("training examples", f"{result.rows[0].size:,} to {last.size:,}"),
        (f"{one_line(result.monitor)} at {last.size:,}", number(last.score.mean)),
        ("runs", f"{len(result.scores):,}"),
        ("noise of one run", "-" if result.noise is None else number(result.noise)),
    ]
    sections = [
        Section("Score by amount of data", picture, note=f"{each}."),
        Section("In words", note=" ".join(sentences(result))),
        Section("Sizes", rows=table(result)),
        Section(
            "Runs",
            rows=[
                ("examples", "seed", one_line(result.monitor)),
                *((f"{size:,}", str(seed), number(value)) for size, seed, value in result.scores),
            ],
        ),
        Section("Configuration", text=yaml.safe_dump(dict(plan.recipe), sort_keys=False, allow_unicode=True)),
    ]
    page = render(
        f"How much data: {plan.output.name}", f"{one_line(result.monitor)} by training examples", figures, sections
    )
    with atomic_file(plan.output / PAGE) as new:
        new.write_text(page, encoding="utf-8")
    return plan.output / PAGE
