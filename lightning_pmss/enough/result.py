"""The result of a study: a table of its sizes, the curve, and what they mean in words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning_pmss.enough.curve import FARTHEST, Curve, Interval, NoCurve, fit_curve
from lightning_pmss.enough.statistics import CONFIDENCE, Mean, Scores, gain, mean_of, noise
from lightning_pmss.messages import one_line
from lightning_pmss.store.disk import atomic_file


@dataclass(frozen=True)
class Row:
    """What is known of one size.

    Args:
        size: Training examples.
        score: Mean score over the seeds.
        better: By how much it is better than the size before, paired by seed; null for the first one.
    """

    size: int
    score: Mean
    better: Mean | None


@dataclass(frozen=True)
class Result:
    """Scores of a study, a curve through them, and sentences.

    Args:
        monitor: Name of the score.
        mode: Whether less or more of it is better.
        which: Whether the score after the last step is read, or the best of all validations.
        scores: (size, seed, score) of each run.
        rows: What is known of each size.
        noise: Standard deviation of one run's score between seeds, null from one seed.
        curve: The curve of the score, or of its negative where more is better, or why there is none.
        missing: How many runs have no score.
    """

    monitor: str
    mode: Literal["min", "max"]
    which: Literal["last", "best"]
    scores: tuple[tuple[int, int, float], ...]
    rows: tuple[Row, ...]
    noise: float | None
    curve: Curve | NoCurve
    missing: int

    @property
    def sign(self) -> int:
        """1 where less is better, -1 where more is."""
        return 1 if self.mode == "min" else -1


def result_of(
    found: Sequence[tuple[int, int, float]],
    monitor: str,
    mode: Literal["min", "max"],
    which: Literal["last", "best"],
    missing: int,
) -> Result:
    """Return the result of finished runs.

    Args:
        found: (size, seed, score) of each.
        monitor: Name of the score.
        mode: Whether less or more of it is better.
        which: Whether the score after the last step is read, or the best of all validations.
        missing: How many runs have no score.
    """
    sign = 1 if mode == "min" else -1
    scores = Scores.of([(size, seed, sign * value) for size, seed, value in found])
    sizes = sorted({size for size, _, _ in found})
    rows = []
    for before, size in zip([None, *sizes], sizes, strict=False):
        mean = mean_of(list(scores.at(size).values()))
        shown = Mean(mean.count, sign * mean.mean, mean.half)
        rows.append(Row(size, shown, None if before is None else gain(scores, before, size)))
    curve = fit_curve(scores) if found else NoCurve("no run has finished.")
    return Result(monitor, mode, which, tuple(sorted(found)), tuple(rows), noise(scores), curve, missing)


def table(result: Result) -> list[tuple[str, ...]]:
    """Return the rows of a table, the first one with the headings."""
    percent = f"{CONFIDENCE:.0%}".replace("%", " %")
    head = ("examples", "runs", one_line(result.monitor), f"{percent} interval", "gain, paired", f"{percent} interval")
    rows: list[tuple[str, ...]] = [head]
    for row in result.rows:
        better = row.better
        rows.append(
            (
                f"{row.size:,}",
                str(row.score.count),
                number(row.score.mean),
                _interval(row.score),
                "-" if better is None else number(better.mean),
                "-" if better is None else _interval(better),
            )
        )
    return rows


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Return a table as text with columns of equal width."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def sentences(result: Result) -> list[str]:
    """Return what the result means, in words."""
    said = []
    if result.missing:
        runs = "1 run has" if result.missing == 1 else f"{result.missing} runs have"
        said.append(f"{runs} no score; everything here is without {'it' if result.missing == 1 else 'them'}.")
    if result.which == "best":
        said.append(
            "Scores are the best of several validations on the same examples, which is better than new examples would give."
        )
    if isinstance(result.curve, NoCurve):
        reason = result.curve.reason
        return [*said, f"No curve: {reason}", *_measured(result)]
    return [*said, _formula(result, result.curve), *_expected(result, result.curve)]


def _measured(result: Result) -> list[str]:
    """Say what the last step from size to size brought, which needs no curve."""
    if len(result.rows) < 2 or (last := result.rows[-1].better) is None:
        return []
    sizes = f"from {result.rows[-2].size:,} to {result.rows[-1].size:,} examples"
    change = -result.sign * last.mean
    moved = f"{one_line(result.monitor)} {'rose' if change > 0 else 'fell'} by {number(abs(change))}"
    if last.half is None:
        return [f"Measured with one seed: {sizes}, {moved}."]
    sure = "" if abs(change) > last.half else ", which is within the noise"
    ends = _between((change - last.half, change + last.half))
    return [f"Measured: {sizes}, {moved} (change: {ends}){sure}."]


def _formula(result: Result, curve: Curve) -> str:
    sign, name = result.sign, one_line(result.monitor)
    low, high = sorted(sign * end for end in curve.asymptotes)
    operator = "+" if sign * curve.factor > 0 else "-"
    return (
        f"Curve: {name} = {number(sign * curve.asymptote)} {operator} {number(abs(curve.factor))} n^-{number(curve.exponent)};"
        f" with unlimited data it would reach {number(sign * curve.asymptote)} ({_between((low, high))}); the exponent is"
        f" {_between(curve.exponent_interval, 'between')}."
    )


def _expected(result: Result, curve: Curve) -> list[str]:
    verb, name, largest = "lower" if result.mode == "min" else "raise", one_line(result.monitor), curve.largest
    gained, interval = curve.gain(largest)
    said = [
        f"Doubling the data from {largest:,} to {2 * largest:,} examples is expected to {verb} {name} by {number(gained)}"
        f" ({_between(interval)})."
    ]
    if result.noise is None:
        return [*said, "One seed shows no noise to compare this with; give --seeds 3."]
    if result.noise == 0:
        return [*said, "All seeds scored the same, so no gain falls under the noise."]
    size, (low, high) = curve.size_of_gain(result.noise)
    noise = f"the noise (one run's standard deviation between seeds, {number(result.noise)})"
    far = FARTHEST * largest
    if size > far:
        said.append(
            f"The gain of a doubling stays above {noise} up to {far:,} examples, {FARTHEST} times the largest size, beyond"
            " which this curve says nothing."
        )
        return said
    smallest = result.rows[0].size
    if size < smallest:  # the curve is read from the smallest size on
        said.append(
            f"The gain of a doubling is under {noise} at all sizes measured, from {smallest:,} examples on: one run"
            " on twice the data need not be better."
        )
        return said
    about = _rounded(size)
    start = f"{_rounded(low):,}" if low >= smallest else f"below {smallest:,}"
    ends = f"{start} to {_rounded(high):,}" if high <= far else f"{start} to beyond {far:,}"
    reached = "has fallen" if size <= largest else "falls"
    said.append(
        f"The gain of a doubling {reached} under {noise} at about {about:,} examples (95 % interval {ends}): from there, one"
        " run on twice the data need not be better."
    )
    return said


def _rounded(size: float) -> int:
    """A size to two digits."""
    return int(float(f"{size:.2g}"))


def number(value: float) -> str:
    """Return a number with four digits."""
    return f"{value:.4g}"


def _between(interval: Interval, word: str = "95 % interval") -> str:
    joined = "and" if word == "between" else "to"
    return f"{word} {number(interval[0])} {joined} {number(interval[1])}"


def _interval(mean: Mean) -> str:
    return "-" if mean.half is None else f"{number(mean.mean - mean.half)} to {number(mean.mean + mean.half)}"


def write_result(path: Path, result: Result, settings: dict[str, Any]) -> None:
    """Write the result as JSON.

    Args:
        path: The file.
        result: The result.
        settings: What else the file says about the study.
    """
    curve = result.curve
    if isinstance(curve, NoCurve):
        fitted: dict[str, Any] = {"fitted": False, "reason": curve.reason}
    else:
        gained, interval = curve.gain(curve.largest)
        low, high = sorted(result.sign * end for end in curve.asymptotes)
        fitted = {
            "fitted": True,
            "formula": "asymptote + factor * n ** -exponent",
            "asymptote": result.sign * curve.asymptote,
            "asymptote_interval": [low, high],
            "factor": result.sign * curve.factor,
            "exponent": curve.exponent,
            "exponent_interval": list(curve.exponent_interval),
            "residual": curve.residual,
            "doubling": {"from": curve.largest, "gain": gained, "interval": list(interval)},
        }
        if result.noise:
            size, ends = curve.size_of_gain(result.noise)
            known = {"size": _finite(size), "interval": list(map(_finite, ends))}
            fitted["gain_under_noise"] = known if size >= result.rows[0].size else None  # at all sizes measured
    record = {
        **settings,
        "monitor": result.monitor,
        "mode": result.mode,
        "score": result.which,
        "confidence": CONFIDENCE,
        "runs": [{"size": size, "seed": seed, "score": value} for size, seed, value in result.scores],
        "missing": result.missing,
        "sizes": [
            {"size": row.size, "score": vars(row.score), "gain": None if row.better is None else vars(row.better)}
            for row in result.rows
        ],
        "noise": result.noise,
        "curve": fitted,
        "sentences": sentences(result),
    }
    with atomic_file(path) as new:
        new.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _finite(value: float) -> float | None:
    return value if value < 1e300 else None
