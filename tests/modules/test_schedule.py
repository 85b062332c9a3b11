"""Learning-rate factors by hand."""

from __future__ import annotations

import pytest

from lightning_pmss.modules.schedule import schedule_factor


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1, 1, 0.853553, 0.5, 0.146447]),
    ],
)
def test_factors(kind: str, expected: list[float]) -> None:
    factors = [schedule_factor(step, kind=kind, warmup_steps=2, total_steps=6) for step in range(6)]
    assert factors == pytest.approx(expected, abs=1e-6)


def test_no_step_is_spent_at_rate_zero_and_none_beyond_the_end_rises() -> None:
    assert schedule_factor(0, kind="cosine", warmup_steps=0, total_steps=1) == 1
    assert schedule_factor(6, kind="linear", warmup_steps=2, total_steps=6) == 0
    assert schedule_factor(99, kind="cosine", warmup_steps=2, total_steps=6) == pytest.approx(0)
    assert schedule_factor(99, kind="constant", warmup_steps=0, total_steps=float("inf")) == 1
