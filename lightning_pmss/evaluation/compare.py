"""Compare two models on the same questions, with intervals and a test."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_pmss.evaluation.bootstrap import (
    CONFIDENCE,
    RESAMPLES,
    Interval,
    check_options,
    interval_of_mean,
    mcnemar_exact,
)
from lightning_pmss.evaluation.records import is_score, read_records

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Comparison:
    """Result of `compare_files`.

    Args:
        files: The two files.
        scores: By name of the score: A's interval, B's interval, and the interval of the paired difference B - A.
        counts: Number of questions that ``both``, ``only_a``, ``only_b``, ``neither`` answer correctly (score at least 1).
        p: p-value of McNemar's exact test on ``only_a`` and ``only_b``.
        confidence: Confidence of the intervals.
    """

    files: tuple[str, str]
    scores: dict[str, tuple[Interval, Interval, Interval]]
    counts: dict[str, int]
    p: float
    confidence: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        names = ("a", "b", "difference")
        scores = {
            key: {name: part.to_dict() for name, part in zip(names, parts, strict=True)}
            for key, parts in self.scores.items()
        }
        files = dict(zip(("a", "b"), self.files, strict=True))
        return {
            "files": files,
            "confidence": self.confidence,
            "scores": scores,
            "counts": self.counts,
            "mcnemar_p": self.p,
        }

    def __str__(self) -> str:
        n = sum(self.counts.values())
        lines = [f"A  {self.files[0]}", f"B  {self.files[1]}", f"{n} examples, {self.confidence:.0%} intervals", ""]
        for key, (a, b, difference) in self.scores.items():
            lines += [f"{key:<16}   A {_percent(a)}   B {_percent(b)}   B - A {_percent(difference, sign=True)}"]
        c = self.counts
        right = f"both {c['both']}, only A {c['only_a']}, only B {c['only_b']}, neither {c['neither']}"
        lines += ["", f"right: {right}", f"McNemar's exact test: p = {self.p:.3g}", self.verdict()]
        return "\n".join(lines)

    def verdict(self) -> str:
        """Summarise the first score in one sentence."""
        key, (_, _, difference) = next(iter(self.scores.items()))
        if difference.low <= 0 <= difference.high:
            return f"The interval of the difference in {key} contains 0: these examples do not distinguish A and B."
        better, worse = ("B", "A") if difference.mean > 0 else ("A", "B")
        return f"{better} scores higher than {worse} in {key}; the interval of the difference does not contain 0."


def _percent(part: Interval, sign: bool = False) -> str:
    form = "+.1f" if sign else ".1f"
    mean, low, high = (format(100 * value, form) for value in (part.mean, part.low, part.high))
    return f"{mean} [{low}, {high}] %"


def compare_files(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    ignore_prompts: bool = False,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Comparison:
    """Compare two predictions files that answer the same questions.

    Args:
        a: Predictions file of A, such as ``predictions-test.jsonl``.
        b: Predictions file of B.
        ignore_prompts: Allow different prompts (two prompt styles, for instance), but not different ids or targets.
        resamples: Number of resamples of the bootstrap.
        confidence: Confidence of the intervals.
        seed: Seed of the bootstrap.

    Raises:
        FileNotFoundError: A file does not exist.
        ValueError: A file is not a predictions file or has no scores, or the files answer different questions.
    """
    check_options(resamples, confidence)
    files = (str(a), str(b))
    first, second = ({row["id"]: row for row in read_records(path)} for path in files)
    _check_same_questions(files, first, second, ignore_prompts)
    ids = sorted(first, key=_order)
    names = [name for name in _score_names(files[0], first.values()) if name in _score_names(files[1], second.values())]
    if not names:
        raise ValueError(
            f"{files[0]} and {files[1]} have no score in common. Run `test` with the same --model.metric for both."
        )
    options: dict[str, Any] = {"resamples": resamples, "confidence": confidence, "seed": seed}
    scores = {}
    for name in names:
        ours, theirs = ([float(side[number][name]) for number in ids] for side in (first, second))
        differences = [y - x for x, y in zip(ours, theirs, strict=True)]
        scores[name] = tuple(interval_of_mean(values, **options) for values in (ours, theirs, differences))
    pairs = [(first[number][names[0]] >= 1, second[number][names[0]] >= 1) for number in ids]
    kinds = {"both": (True, True), "only_a": (True, False), "only_b": (False, True), "neither": (False, False)}
    counts = {kind: pairs.count(pair) for kind, pair in kinds.items()}
    return Comparison(files, scores, counts, mcnemar_exact(counts["only_a"], counts["only_b"]), confidence)  # type: ignore[arg-type]


def score_names(row: Row) -> list[str]:
    """List the keys of a row that contain scores."""
    return [key for key in row if is_score(key) and row[key] is not None]


def _order(number: int | str) -> tuple[bool, int | str]:
    """Sort key for ids, numbers before texts; files of other programs may have texts."""
    return isinstance(number, str), number


def _score_names(file: str, rows: Any) -> list[str]:
    rows = list(rows)
    names = score_names(rows[0]) if rows else []
    for row in rows:
        if score_names(row) != names:
            raise ValueError(
                f"{file}: the example with id {row['id']!r} has the scores {score_names(row)}, the first one {names}. "
                "Run `test` with a metric, and targets for all examples."
            )
    if not names:
        raise ValueError(f"{file} has no scores. Run `test` with --model.metric, such as GSM8KAccuracy.")
    return names


def _check_same_questions(
    files: Sequence[str], a: Mapping[Any, Row], b: Mapping[Any, Row], ignore_prompts: bool
) -> None:
    for path, rows in zip(files, (a, b), strict=True):
        if not rows:
            raise ValueError(f"{path} contains no predictions; run `test` first.")
    for path, other, lacking in ((files[0], files[1], b.keys() - a.keys()), (files[1], files[0], a.keys() - b.keys())):
        if lacking:
            shown = ", ".join(map(str, sorted(lacking, key=_order)[:5])) + (", ..." if len(lacking) > 5 else "")
            raise ValueError(
                f"{path} lacks {len(lacking)} of the examples in {other} (ids {shown}): they answer different "
                "questions. Run `test` for both with the same --data options (path, test_limit), and to its end."
            )
    for key, others, remedy in (
        ("prompt", "other prompts", "the same --data options and --data.prompt_style, or give --ignore-prompts"),
        ("target", "other targets", "the same --data options"),
    ):
        differing = [number for number in a if a[number].get(key) != b[number].get(key)]
        if differing and not (key == "prompt" and ignore_prompts):
            raise ValueError(
                f"{len(differing)} of {len(a)} examples have {others} in {files[0]} than in {files[1]} (first: id "
                f"{min(differing, key=_order)}): they answer different questions. Run `test` for both with {remedy}."
            )
