"""Means with intervals, gains from size to size, and noise of scores; less is better here.

Runs of one seed are paired: their subsets are nested, and they share the seed of everything random.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Scores:
    """The scores of finished runs, an entry each.

    Args:
        sizes: Training examples.
        seeds: Seed.
        values: Score; less is better.
    """

    sizes: np.ndarray
    seeds: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, found: Sequence[tuple[int, int, float]]) -> Scores:
        """Take (size, seed, value)."""
        ordered = sorted(found)
        sizes, seeds, values = zip(*ordered, strict=True) if ordered else ((), (), ())
        return cls(np.array(sizes, dtype=np.int64), np.array(seeds, dtype=np.int64), np.array(values, dtype=np.float64))

    def at(self, size: int) -> dict[int, float]:
        """Return the values of one size by seed."""
        here = self.sizes == size
        return dict(zip(self.seeds[here].tolist(), self.values[here].tolist(), strict=True))


@dataclass(frozen=True)
class Mean:
    """A mean over seeds with its interval by Student's t, null from one value.

    Args:
        count: Values.
        mean: Their mean.
        half: Half of the interval's width.
    """

    count: int
    mean: float
    half: float | None


def mean_of(values: Sequence[float], confidence: float = CONFIDENCE) -> Mean:
    """Return the mean of values and its interval."""
    count, mean = len(values), float(np.mean(values))
    if count < 2:
        return Mean(count, mean, None)
    half = stats.t.ppf((1 + confidence) / 2, count - 1) * np.std(values, ddof=1) / math.sqrt(count)
    return Mean(count, mean, float(half))


def gain(scores: Scores, smaller: int, larger: int, confidence: float = CONFIDENCE) -> Mean | None:
    """Return by how much the larger size is better, paired by seed; null if no seed has both."""
    before, after = scores.at(smaller), scores.at(larger)
    both = [before[seed] - after[seed] for seed in before if seed in after]
    return mean_of(both, confidence) if both else None


def noise(scores: Scores) -> float | None:
    """Return the standard deviation of one run's score between seeds, pooled over the sizes; null where no size has two."""
    groups = [list(scores.at(size).values()) for size in np.unique(scores.sizes).tolist()]
    freedom = sum(len(group) - 1 for group in groups)
    if not freedom:
        return None
    squares = sum(float(np.sum((np.array(group) - np.mean(group)) ** 2)) for group in groups)
    return math.sqrt(squares / freedom)
