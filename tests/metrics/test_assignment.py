"""The assignment of spans against scipy's, and the properties that need no reference."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from lightning_pmss.metrics.assignment import best_assignment


@pytest.mark.parametrize("seed", range(60))
def test_sum_equals_scipys(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, columns = rng.integers(1, 9, size=2)
    # Few values make many ties, as F1 scores do.
    scores = rng.choice([0.0, 0.0, 0.25, 0.5, 2 / 3, 1.0], size=(rows, columns))
    if seed % 3 == 0:
        scores = rng.normal(size=(rows, columns))
    pairs = best_assignment(scores.tolist())
    assert len(pairs) == min(rows, columns)
    assert len({row for row, _ in pairs}) == len({column for _, column in pairs}) == len(pairs)
    assert pairs == sorted(pairs)
    ours = sum(scores[row, column] for row, column in pairs)
    assert ours == pytest.approx(scores[linear_sum_assignment(-scores)].sum(), abs=1e-9)


def test_against_all_permutations() -> None:
    rng = np.random.default_rng(7)
    for _ in range(30):
        scores = rng.random((5, 5))
        best = max(sum(scores[i, j] for i, j in enumerate(order)) for order in itertools.permutations(range(5)))
        assert sum(scores[i, j] for i, j in best_assignment(scores.tolist())) == pytest.approx(best)


def test_large_and_empty() -> None:
    scores = np.random.default_rng(0).random((40, 60))
    ours = sum(scores[pair] for pair in best_assignment(scores.tolist()))
    assert ours == pytest.approx(scores[linear_sum_assignment(-scores)].sum())
    assert best_assignment([]) == []
    assert best_assignment([[], []]) == []


def test_greedy_is_not_enough() -> None:
    assert best_assignment([[1.0, 0.9], [0.9, 0.0]]) == [(0, 1), (1, 0)]
