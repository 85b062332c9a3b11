r"""A saturating curve through scores: ``L(n) = a + b n^-c``, with an ``a`` of its own for each seed.

For a given ``c`` the curve is linear, so a search over ``c`` alone finds the best one, and cannot end elsewhere. Intervals are
those of the profile likelihood: the values of a quantity for which some curve fits not significantly worse than the best one (F
distribution). Unlike a covariance, they show where the data leaves ``c`` open: then there is no curve, but a reason.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

from lightning_pmss.enough.statistics import CONFIDENCE, Scores

FEWEST_SIZES = 4
FARTHEST = 10
"""A curve is not read beyond so many times the largest size."""
_LEAST, _MOST = 0.01, 5.0  # exponents; outside the curve is a logarithm, or a step after the smallest size
_POINTS = 2000
_EXACT = 1e-12  # squares of scores without noise, of those of their differences
_MISFIT = 0.01  # of a hundred sets of scores that do follow such a curve, one is refused

Interval = tuple[float, float]


@dataclass(frozen=True)
class NoCurve:
    """No curve was fitted.

    Args:
        reason: Why, as a sentence.
    """

    reason: str


@dataclass(frozen=True)
class Curve:
    """A fitted curve, with the set of curves that fit not significantly worse.

    Args:
        asymptote: ``a``, its mean over the seeds.
        factor: ``b``.
        exponent: ``c``.
        residual: Standard deviation of the scores about the curves of their seeds.
        largest: The largest size fitted.
        exponents: Exponents of the set.
        gains: Of each exponent of the set the least and the largest gain from ``largest`` to twice as many, float64 ``[m, 2]``.
        asymptotes: Interval of ``a``.
    """

    asymptote: float
    factor: float
    exponent: float
    residual: float
    largest: int
    exponents: np.ndarray
    gains: np.ndarray
    asymptotes: Interval

    @property
    def exponent_interval(self) -> Interval:
        """Interval of ``c``."""
        return float(self.exponents.min()), float(self.exponents.max())

    def at(self, size: float | np.ndarray) -> float | np.ndarray:
        """Return the curve's score at a size."""
        return self.asymptote + self.factor * size**-self.exponent

    def gain(self, size: float) -> tuple[float, Interval]:
        """Return by how much twice as many examples are expected to be better, with the interval."""
        best = self.factor * size**-self.exponent * (1 - 2**-self.exponent)
        found = self.gains * (size / self.largest) ** -self.exponents[:, None]
        return best, (float(found.min()), float(found.max()))

    def size_of_gain(self, gain: float) -> tuple[float, Interval]:
        """Return the size from which doubling is worth less than ``gain``, with the interval; 0 if no size is worth as much."""
        best = (self.factor * (1 - 2**-self.exponent) / gain) ** (1 / self.exponent)
        with np.errstate(over="ignore"):
            found = self.largest * (np.maximum(self.gains, 0) / gain) ** (1 / self.exponents[:, None])
        return best, (float(found.min()), float(found.max()))


def fit_curve(scores: Scores, confidence: float = CONFIDENCE) -> Curve | NoCurve:
    """Fit a curve to scores of several sizes and seeds, or say why none is fitted.

    Args:
        scores: Of finished runs; less is better.
        confidence: Of intervals.
    """
    sizes = np.unique(scores.sizes)
    seeds, numbers = np.unique(scores.seeds, return_inverse=True)
    if len(sizes) < FEWEST_SIZES:
        return NoCurve(
            f"a curve with an asymptote needs at least {FEWEST_SIZES} sizes, and there are {len(sizes)}, so nothing is said"
            " beyond those measured."
        )
    freedom = len(scores.values) - len(seeds) - 2
    if freedom < 1:
        return NoCurve("too few runs have finished for a curve; the gains above are measured.")
    problem = _Problem(scores, numbers, int(sizes[-1]))
    grid = np.geomspace(_LEAST, _MOST, _POINTS)
    squares, _, _ = problem.solve(grid)
    place = int(squares.argmin())
    around = grid[[max(0, place - 1), min(_POINTS - 1, place + 1)]]
    found = optimize.minimize_scalar(
        lambda c: float(problem.solve(np.array([c]))[0][0]), bounds=around, method="bounded"
    )
    exponent = float(found.x) if found.fun <= squares[place] else float(grid[place])
    least, gain, _ = (float(part[0]) for part in problem.solve(np.array([exponent])))
    total = float(problem.values @ problem.values)
    least = max(least, _EXACT * total)
    if total == 0 or stats.f.sf((total - least) / 2 / (least / freedom), 2, freedom) > 1 - confidence:
        return NoCurve(
            "the scores of the sizes do not differ by more than their noise, so no curve is fitted: more data made no"
            " difference that these runs show."
        )
    if gain <= 0:
        return NoCurve("the score got worse with more data, so no saturating curve is fitted.")
    if (chance := _misfit(scores, least, total)) is not None and chance < _MISFIT:
        return NoCurve(
            f"the means do not lie on a saturating power law (lack of fit, p = {chance:.2g}), so nothing is said beyond the"
            " sizes measured."
        )
    limit = least * (1 + float(stats.f.ppf(confidence, 1, freedom)) / freedom)
    inside = np.append(grid[squares <= limit], exponent)
    inside.sort()
    if inside[0] <= grid[0] * 1.0001:
        return NoCurve(
            "the runs leave open whether the score saturates at all: a curve without an asymptote fits as well. More seeds, or"
            " larger sizes, may tell; nothing is said beyond the sizes measured."
        )
    if inside[-1] >= grid[-1] * 0.9999:
        return NoCurve(
            "the runs leave the curve's shape open: the score may have saturated after the smallest size. Smaller sizes, or"
            " more seeds, may tell; nothing is said beyond the sizes measured."
        )
    at, gains, norms = problem.solve(inside)
    width = np.sqrt(np.maximum(limit - at, 0) / norms)
    factor = gain * problem.largest**exponent / (1 - 2**-exponent)
    asymptote, asymptotes = problem.asymptote(exponent, gain, inside, gains, width, least / freedom, confidence)
    return Curve(
        asymptote,
        factor,
        exponent,
        math.sqrt(least / freedom),
        problem.largest,
        inside,
        np.stack((gains - width, gains + width), axis=1),
        asymptotes,
    )


class _Problem:
    """Least squares of ``L = a_seed + g h_c(n)`` for given ``c``, where ``g`` is the gain of doubling the largest size.

    Args:
        scores: The scores.
        numbers: The number of each score's seed, from 0.
        largest: The largest size.
    """

    def __init__(self, scores: Scores, numbers: np.ndarray, largest: int) -> None:
        self.scores, self.numbers, self.largest = scores, numbers, largest
        self.counts = np.bincount(numbers)
        self.values = scores.values - self._by_seed(scores.values[None])[0][numbers]

    def _by_seed(self, values: np.ndarray) -> np.ndarray:
        """Return the means over each seed, ``[m, entries]`` to ``[m, seeds]``."""
        return np.stack([np.bincount(self.numbers, row) for row in values]) / self.counts

    def _basis(self, exponents: np.ndarray) -> np.ndarray:
        ratio = (self.scores.sizes / self.largest)[None]
        return ratio ** -exponents[:, None] / (1 - 2 ** -exponents[:, None])

    def solve(self, exponents: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the sum of squares, the gain, and the sum of squares of the basis for each exponent."""
        basis = self._basis(exponents)
        basis = basis - self._by_seed(basis)[:, self.numbers]
        norms = (basis**2).sum(1)
        gains = basis @ self.values / norms
        return ((self.values[None] - gains[:, None] * basis) ** 2).sum(1), gains, norms

    def asymptote(
        self,
        exponent: float,
        gain: float,
        inside: np.ndarray,
        gains: np.ndarray,
        width: np.ndarray,
        variance: float,
        confidence: float,
    ) -> tuple[float, Interval]:
        """Return the mean asymptote over seeds and its interval, in which seeds are drawn at random."""

        def of(exponents: np.ndarray, factors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            means = self._by_seed(self._basis(exponents))
            return self._by_seed(self.scores.values[None]) - factors[:, None] * means, means.mean(1)

        best = float(of(np.array([exponent]), np.array([gain]))[0].mean())
        each, lever = of(inside, gains)
        count = each.shape[1]
        if count > 1:
            error = each.std(1, ddof=1) / math.sqrt(count) * stats.t.ppf((1 + confidence) / 2, count - 1)
        else:
            freedom = len(self.scores.values) - 3
            error = np.full(len(inside), math.sqrt(variance / len(self.scores.values)))
            error *= stats.t.ppf((1 + confidence) / 2, freedom)
        half = np.hypot(error, width * lever)
        return best, (float((each.mean(1) - half).min()), float((each.mean(1) + half).max()))


def _misfit(scores: Scores, least: float, total: float) -> float | None:
    """Return how likely means so far off the curve are if it holds, null without several runs per size.

    The curve is compared with one mean per size and seed, of which it is a special case.
    """
    sizes, columns = np.unique(scores.sizes, return_inverse=True)
    seeds, rows = np.unique(scores.seeds, return_inverse=True)
    design = np.concatenate((np.eye(len(sizes))[columns], np.eye(len(seeds))[rows]), axis=1)
    rank = int(np.linalg.matrix_rank(design))
    solution = np.linalg.lstsq(design, scores.values, rcond=None)[0]
    pure = max(float(((scores.values - design @ solution) ** 2).sum()), _EXACT * total)
    free, used = len(scores.values) - rank, rank - len(seeds) - 2
    if free < 1 or used < 1:
        return None
    return float(stats.f.sf(max(0.0, least - pure) / used / (pure / free), used, free))
