"""Intervals and McNemar's test against the normal approximation and by hand."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from lightning_pmss.evaluation.bootstrap import Interval, interval_of_mean, mcnemar_exact


def test_interval_is_about_the_normal_one() -> None:
    values = np.random.default_rng(3).normal(2.0, 1.5, 60)
    found = interval_of_mean(values.tolist(), seed=1)
    half = 1.96 * values.std() / math.sqrt(60)
    assert found.mean == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((found.mean - half, found.mean + half), abs=0.03)
    assert found.n == 60


def test_one_example_has_no_width() -> None:
    assert interval_of_mean([0.3]) == Interval(0.3, 0.3, 0.3, 1)


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    draws = (generator.random((300, 80)) < 0.3).astype(float)
    hits = 0
    for number, values in enumerate(draws):
        found = interval_of_mean(values, resamples=500, confidence=0.9, seed=number)
        hits += found.low <= 0.3 <= found.high
    assert 0.84 < hits / 300 < 0.95


def test_same_seed_same_interval_and_other_seed_another() -> None:
    values = [0.0, 1.0, 1.0, 0.0, 0.5, 0.3, 0.9]
    assert interval_of_mean(values, seed=5) == interval_of_mean(values, seed=5)
    assert interval_of_mean(values, seed=5, resamples=50) != interval_of_mean(values, seed=6, resamples=50)


def test_constant_values_have_no_width_and_memory_is_bounded() -> None:
    found = interval_of_mean([0.1] * 9, resamples=100)
    assert (found.low, found.mean, found.high) == (pytest.approx(0.1), 0.1, pytest.approx(0.1))
    long = interval_of_mean([0.0, 1.0] * 50_000, resamples=120)  # three chunks
    assert long.low < 0.5 < long.high < 0.51


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([], {}, "no example"),
        ([1.0, math.nan], {}, "value of example 1 is not finite"),
        ([1.0], {"confidence": 95}, "share between 0 and 1"),
        ([1.0], {"resamples": 0}, "at least 1"),
    ],
)
def test_bad_input_is_refused(values: list[float], options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        interval_of_mean(values, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("a", "b"), [(0, 0), (3, 3), (0, 5), (12, 4), (4, 12), (700, 800)])
def test_mcnemar_sums_the_binomial_tail(a: int, b: int) -> None:
    tail = sum(Fraction(math.comb(a + b, k), 2 ** (a + b)) for k in range(min(a, b) + 1))
    assert mcnemar_exact(a, b) == pytest.approx(float(min(Fraction(1), 2 * tail)), rel=1e-9)
