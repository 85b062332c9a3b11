"""The lowest loss with a frozen head: against what can be said without searching."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from experiments.floor import RECORD, floor_text, measure, token_floor
from experiments.run import Places


def test_rows_that_are_alike_share_the_probability() -> None:
    head = 20 * torch.eye(6)[[0, 1, 2, 2, 2, 3]]
    norm = torch.ones(6)
    assert token_floor(head, norm, 0) < 1e-3
    assert token_floor(head, norm, 3) == pytest.approx(math.log(3), abs=1e-3)


def test_a_row_between_two_others_costs_what_the_circle_allows() -> None:
    # In two dimensions the sphere is a circle, and every angle can be tried.
    head, norm = torch.tensor([[1.0, 0.0], [0.8, 0.8], [0.0, 1.0]]), torch.tensor([1.0, 2.0])
    angles = torch.linspace(0, 2 * math.pi, 100_001, dtype=torch.float64)
    hidden = math.sqrt(2) * torch.stack([angles.cos(), angles.sin()], 1) * norm
    for token in range(3):
        expected = -torch.log_softmax(hidden @ head.double().T, 1)[:, token].max()
        assert token_floor(head, norm, token) == pytest.approx(float(expected), abs=1e-4)


def test_the_page_tells_the_floor_of_the_record() -> None:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    page = Path(__file__).resolve().parents[2] / "docs" / "evidence.md"
    assert floor_text(record) in page.read_text(encoding="utf-8")
    assert f"**{record['mean']:.3f}**" in floor_text(record)


def test_the_record_is_what_is_measured(shared: Path, tmp_path: Path) -> None:
    found = measure(Places((str(shared / "models"),), str(shared / "data"), str(tmp_path)))
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    assert found["mean"] == pytest.approx(record["mean"], abs=1e-3)
    assert found["tokens_alike"] == record["tokens_alike"]
