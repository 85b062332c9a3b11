"""Means, gains and the saturating curve, against closed forms, scipy, and simulated scores whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import optimize, stats

from lightning_pmss.enough.curve import Curve, NoCurve, fit_curve
from lightning_pmss.enough.statistics import Mean, Scores, gain, mean_of, noise

SIZES = (50, 200, 800, 3200)
A, B, C = 1.0, 4.0, 0.5


def truth(size: float) -> float:
    return A + B * size**-C


def simulated(
    rng: np.random.Generator, sigma: float, seeds: int = 3, effect: float = 0.0, sizes: tuple[int, ...] = SIZES
) -> Scores:
    shifts = rng.normal(0, effect, seeds)
    return Scores.of([(n, s, truth(n) + shifts[s] + rng.normal(0, sigma)) for n in sizes for s in range(seeds)])


def fitted(scores: Scores) -> Curve:
    curve = fit_curve(scores)
    assert isinstance(curve, Curve), curve
    return curve


def refused(scores: Scores) -> str:
    curve = fit_curve(scores)
    assert isinstance(curve, NoCurve)
    return curve.reason


def test_means_and_their_intervals() -> None:
    values = [1.0, 2.0, 4.0, 4.5]
    found = mean_of(values)
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert found.half is not None
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))
    assert mean_of([3.0]) == Mean(1, 3.0, None)


def test_gains_are_paired() -> None:
    """A seed that is worse at all sizes does not widen the interval of a gain; a seed without its pair is left out."""
    scores = Scores.of([(10, 0, 3.0), (10, 1, 8.0), (20, 0, 2.0), (20, 1, 6.9), (20, 2, 1.0)])
    found = gain(scores, 10, 20)
    assert found is not None
    assert (found.count, found.mean) == (2, pytest.approx(1.05))
    low, high = stats.ttest_rel([3.0, 8.0], [2.0, 6.9]).confidence_interval(0.95)
    assert found.half == pytest.approx((high - low) / 2)
    assert gain(scores, 20, 40) is None


def test_noise_is_pooled_over_the_sizes() -> None:
    scores = Scores.of([(10, 0, 1.0), (10, 1, 3.0), (20, 0, 5.0), (20, 1, 5.0), (20, 2, 8.0), (40, 0, 0.0)])
    assert noise(scores) == pytest.approx(math.sqrt((2.0 + 6.0) / 3))
    assert noise(Scores.of([(10, 0, 1.0), (20, 0, 2.0)])) is None


def test_the_best_curve_is_that_of_scipy() -> None:
    rng = np.random.default_rng(0)
    scores = simulated(rng, 0.02, sizes=(50, 100, 200, 400, 800, 1600))
    curve = fitted(scores)
    means = np.array([np.mean(list(scores.at(n).values())) for n in np.unique(scores.sizes)])
    # With equally many runs of each size the seeds' own asymptotes change nothing but the residual.
    (a, b, c), _ = optimize.curve_fit(lambda n, a, b, c: a + b * n**-c, np.unique(scores.sizes), means, (1, 4, 0.5))
    assert (curve.asymptote, curve.factor, curve.exponent) == pytest.approx((a, b, c), rel=1e-3)
    shifts = np.array([scores.values[scores.seeds == s].mean() - scores.values.mean() for s in scores.seeds])
    squares = ((scores.values - shifts - curve.at(scores.sizes)) ** 2).sum()
    assert curve.residual == pytest.approx(math.sqrt(squares / (18 - 3 - 2)), rel=1e-4)


def test_scores_without_noise() -> None:
    curve = fitted(Scores.of([(n, s, truth(n) + s / 10) for n in SIZES for s in range(3)]))
    assert (curve.factor, curve.exponent) == pytest.approx((B, C), rel=1e-3)
    assert curve.asymptote == pytest.approx(A + 0.1, rel=1e-3)  # the mean over seeds
    assert curve.asymptotes[0] < A + 0.1 < curve.asymptotes[1]
    best, (low, high) = curve.gain(3200)
    assert best == pytest.approx(truth(3200) - truth(6400), rel=1e-3)
    assert low <= best <= high
    size, _ = curve.size_of_gain(0.01)
    assert truth(size) - truth(2 * size) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(
    ("seeds", "sigma", "effect", "sizes"),
    [(3, 0.01, 0.0, SIZES), (3, 0.03, 0.05, SIZES), (2, 0.02, 0.0, SIZES), (5, 0.03, 0.02, (50, 100, 200, 400, 800))],
)
def test_intervals_hold_the_truth_as_often_as_they_say(
    seeds: int, sigma: float, effect: float, sizes: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(7)
    held = {"gain": 0, "exponent": 0, "asymptote": 0, "size": 0}
    largest, count, trials = sizes[-1], 0, 200
    size = (B * (1 - 2**-C) / sigma) ** (1 / C)  # where a doubling gains as much as the noise
    for _ in range(trials):
        curve = fit_curve(simulated(rng, sigma, seeds, effect, sizes))
        if isinstance(curve, NoCurve):
            continue
        count += 1
        for name, value, (low, high) in (
            ("gain", truth(largest) - truth(2 * largest), curve.gain(largest)[1]),
            ("exponent", C, curve.exponent_interval),
            ("asymptote", A, curve.asymptotes),
            ("size", size, curve.size_of_gain(sigma)[1]),
        ):
            held[name] += low <= value <= high
    assert count > 0.7 * trials
    for name, hits in held.items():
        # 95 % less three standard errors of so many trials; the asymptote's is wider than it need be.
        assert hits / count > 0.95 - 3 * math.sqrt(0.95 * 0.05 / count), name


def test_a_shift_of_a_seed_does_not_touch_the_gain() -> None:
    rng = np.random.default_rng(1)
    scores = simulated(rng, 0.02)
    shifted = Scores(scores.sizes, scores.seeds, scores.values + scores.seeds * 5.0)
    assert fitted(shifted).gain(3200)[0] == pytest.approx(fitted(scores).gain(3200)[0])


def test_a_missing_run_is_no_bias() -> None:
    """Without seed effects of their own, curves would bend towards the seeds that have a run of a size."""
    full = [(n, s, truth(n) + 0.5 * s + 0.001 * ((n // 50 + s) % 3)) for n in SIZES for s in range(3)]
    found = fitted(Scores.of([entry for entry in full if entry[:2] != (50, 2)]))
    assert found.exponent == pytest.approx(C, rel=0.05)


def test_refusals() -> None:
    rng = np.random.default_rng(3)
    assert "needs at least 4 sizes, and there are 3, so" in refused(simulated(rng, 0.01, sizes=SIZES[:3]))
    flat = Scores.of([(n, s, 1 + rng.normal(0, 0.1)) for n in SIZES for s in range(3)])
    assert "do not differ by more than their noise" in refused(flat)
    constant = Scores.of([(n, s, 1.0) for n in SIZES for s in range(3)])
    assert "do not differ by more than their noise" in refused(constant)
    worse = Scores.of([(n, s, truth(50) - truth(n) + rng.normal(0, 0.01)) for n in SIZES for s in range(3)])
    assert "the score got worse with more data" in refused(worse)
    straight = Scores.of([(n, s, 5 - 0.3 * math.log(n) + rng.normal(0, 0.05)) for n in SIZES for s in range(3)])
    assert "leave open whether the score saturates at all" in refused(straight)
    step = Scores.of([(n, s, float(n == 50) + rng.normal(0, 0.02)) for n in SIZES for s in range(3)])
    assert "may have saturated after the smallest size" in refused(step)
    means = {50: 2.0, 200: 1.9, 800: 1.0, 3200: 0.95}
    bent = Scores.of([(n, s, means[n] + rng.normal(0, 0.01)) for n in SIZES for s in range(3)])
    assert "do not lie on a saturating power law" in refused(bent)
    assert "too few runs have finished" in refused(Scores.of([(n, n, truth(n)) for n in SIZES]))


def test_one_seed_is_enough_for_a_curve_if_there_are_many_sizes() -> None:
    rng = np.random.default_rng(5)
    sizes = (50, 100, 200, 400, 800, 1600, 3200)
    assert fitted(simulated(rng, 0.005, 1, sizes=sizes)).exponent == pytest.approx(C, abs=0.1)


def test_a_gain_that_no_size_has() -> None:
    curve = fitted(Scores.of([(n, s, truth(n)) for n in SIZES for s in range(3)]))
    size, (low, high) = curve.size_of_gain(1e9)
    assert size == pytest.approx(0, abs=1e-6)
    assert 0 <= low <= high < 1
