"""Predictions files: one line per example, each once, complete or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_pmss.evaluation.answers import examine
from lightning_pmss.evaluation.predictions import Prediction, gather_predictions, write_predictions
from lightning_pmss.metrics import CommonsenseAccuracy, DROPScore, GSM8KAccuracy, TextAccuracy, TextMetric
from lightning_pmss.metrics.base import Choice


def row(number: int, output: str = "x") -> Prediction:
    return {"id": number, "prompt": "p", "output": output, "target": "t", "correct": None}


def test_rows_are_sorted_and_repeated_ones_dropped() -> None:
    assert [r["id"] for r in gather_predictions([row(2), row(0), row(2), row(1)])] == [0, 1, 2]


def test_file_holds_any_text(tmp_path: Path) -> None:
    path = tmp_path / "new" / "predictions-test.jsonl"
    write_predictions([row(0, 'two\nlines, "quotes", ünï\u2028')], path)
    with path.open(encoding="utf-8", newline="\n") as file:
        assert [json.loads(line)["output"] for line in file] == ['two\nlines, "quotes", ünï\u2028']
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "predictions-test.jsonl"
    write_predictions([row(0, "old")], path)
    with pytest.raises(TypeError):
        write_predictions([row(0), {**row(1), "output": object()}], path)  # type: ignore[typeddict-item]
    assert "old" in path.read_text()


def test_a_record_shows_what_was_compared() -> None:
    pred, target = "It is\n#### $1,800.0.", "so\n#### 1800"
    strict, corrected = (examine(GSM8KAccuracy(strict=strict), pred, target) for strict in (True, False))
    assert strict == {"extracted": None, "gold": "1800", "score": 0.0, "correct": False}
    assert corrected == {"extracted": "1800", "gold": "1800", "score": 1.0, "correct": True}
    choice = examine(CommonsenseAccuracy(), "answer2, no, answer1", ["ARC-Easy", "answer1"])
    assert choice == {"group": "ARC-Easy", "extracted": "answer2", "gold": "answer1", "score": 0.0, "correct": False}
    assert examine(None, pred, target)["score"] is None


class Letters(TextAccuracy):
    """A metric of a user's: the first letter is the answer."""

    def score(self, pred: str, target: str) -> float:
        return float(self.extract(pred) == self.extract(target))

    def extract(self, text: str) -> str:
        return text[:1]

    def scores(self, pred: str, target: str) -> dict[str, float]:
        return super().scores(pred, target) | {"score_length": min(len(pred) / len(target), 1.0)}

    def choice(self, target: str) -> Choice:
        return Choice("letters", target, ("a", "b"))


class Whole:
    """A user's metric that subclasses nothing."""

    def score(self, pred: str, target: str) -> float:
        return float(pred == target)

    def score_half(self, pred: str, target: str) -> float:
        return 0.5

    def extract(self, text: str) -> str:
        return text.upper()


def test_metrics_of_users_are_asked_by_one_protocol() -> None:
    told = {"group": "letters", "extracted": "a", "gold": "a", "score": 1.0, "score_length": 0.5, "correct": True}
    assert examine(Letters(), "a", "ab") == told
    told = {"extracted": "AB", "gold": "AC", "score": 0.0, "score_half": 0.5, "correct": False}
    assert examine(Whole(), "ab", "ac") == told
    told = {"extracted": "x", "gold": [["x", "y"]], "score": 0.0, "score_f1": 0.5, "correct": False}
    assert examine(DROPScore(), "x", [["x", "y"]]) == told
    assert all(isinstance(metric(), TextMetric) for metric in (Letters, DROPScore, CommonsenseAccuracy, GSM8KAccuracy))
    assert not isinstance(Whole(), TextMetric)
