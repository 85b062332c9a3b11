"""Means over seeds with Student's interval, and differences paired by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from scipy.stats import t as student

Records = Sequence[Mapping[str, Any]]


class Mean(NamedTuple):
    """A mean over ``n`` runs, and half the width of its 95 % interval (NaN for one run)."""

    mean: float
    half: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3f}" if math.isnan(self.half) else f"{self.mean:.3f} ± {self.half:.3f}"


def mean(values: Sequence[float]) -> Mean:
    """Mean of independent values with Student's 95 % interval."""
    n = len(values)
    if n < 2:
        return Mean(values[0] if values else math.nan, math.nan, n)
    half = float(student.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n)
    return Mean(statistics.fmean(values), half, n)


def by_seed(records: Records, score: str) -> dict[int, float]:
    """A score of each seed's run; a run that diverged has none."""
    return {r["spec"]["seed"]: r["scores"][score] for r in records if score in r["scores"]}


def paired(a: Records, b: Records, score: str) -> Mean:
    """Mean of A - B over the seeds that both have: same data, same order."""
    left, right = by_seed(a, score), by_seed(b, score)
    return mean([left[seed] - right[seed] for seed in sorted(left.keys() & right.keys())])
