"""Percentile bootstrap intervals over examples (Efron and Tibshirani 1993, chapter 13), and McNemar's exact test.

The bootstrap estimates how the mean would vary with other examples from the same distribution. It ignores other sources of
noise, such as the seed of the training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

RESAMPLES = 10_000
CONFIDENCE = 0.95
_CHUNK = 4_000_000  # values drawn at a time: 32 MB


@dataclass(frozen=True)
class Interval:
    """A mean over ``n`` examples with the ends of its interval, in the unit of the values."""

    mean: float
    low: float
    high: float
    n: int

    def to_dict(self) -> dict[str, float]:
        """Return plain values for JSON."""
        return asdict(self)


def interval_of_mean(
    values: Sequence[float], *, resamples: int = RESAMPLES, confidence: float = CONFIDENCE, seed: int = 0
) -> Interval:
    """Compute the mean of the values with its percentile bootstrap interval.

    The indices depend only on ``seed``, ``resamples`` and the number of values. So two calls with equally many values use
    the same resamples: they are paired.

    Args:
        values: One number per example.
        resamples: Number of resamples, drawn with replacement.
        confidence: Share of the resampled means inside the interval.
        seed: Seed of the resampling.

    Raises:
        ValueError: No value, a value that is not finite, or an option out of its range.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise ValueError("There is no example to take a mean over.")
    if not np.isfinite(array).all():
        raise ValueError(f"The value of example {int(np.argmin(np.isfinite(array)))} is not finite.")
    check_options(resamples, confidence)
    # Exact, so that the interval of a constant has width 0.
    mean = math.fsum(array) / len(array)
    if len(array) == 1:  # scipy refuses to resample one example
        return Interval(mean, mean, mean, 1)
    from scipy.stats import bootstrap  # here, because the import takes half a second

    found = bootstrap(
        (array,),
        np.mean,
        n_resamples=resamples,
        batch=max(1, _CHUNK // len(array)),
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(mean, min(float(found.low), mean), max(float(found.high), mean), len(array))


def check_options(resamples: int, confidence: float) -> None:
    """Refuse options of the bootstrap that are out of range.

    Raises:
        ValueError: An option is out of its range.
    """
    if resamples < 1:
        raise ValueError(f"{resamples} resamples: give at least 1, better {RESAMPLES}.")
    if not 0 < confidence < 1:
        raise ValueError(f"A confidence of {confidence}: give a share between 0 and 1, such as {CONFIDENCE}.")


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Two-sided p-value of McNemar's exact test (McNemar 1947, in the exact binomial form).

    Under the null hypothesis, an example that just one of the two answers correctly is A's or B's with probability 1/2.

    Args:
        only_a: Number of examples that only A answers correctly.
        only_b: Number of examples that only B answers correctly.

    Returns:
        The probability of a split at least as uneven; 1.0 if there is no such example.
    """
    from scipy.stats import binomtest

    return float(binomtest(min(only_a, only_b), only_a + only_b).pvalue) if only_a + only_b else 1.0
