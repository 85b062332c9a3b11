"""GSM8K's answer rule: a table checked by hand, and properties."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from torchmetrics import MetricCollection

from lightning_pmss.metrics import GSM8KAccuracy

# Each row was read off the published regular expression by hand.
TABLE = [
    ("#### 42", "42"),
    ("Ann has 40 + 2 = <<40+2=42>>42 pens.\n#### 42", "42"),
    ("#### -7", "-7"),
    ("#### 1,234,567", "1234567"),
    ("#### 1,8,0,0", "1800"),
    ("#### 3.50", "3.50"),
    ("#### 42.", "42."),
    ("#### 42 pens", "42"),
    ("#### 12\nQuestion: next\n#### 99", "12"),
    ("##### 5", "5"),
    ("#### 0042", "0042"),
    ("#### ,", ""),
    ("#### .", "."),
    ("#### 5-3", "5"),
    ("####42", None),
    ("####  42", None),
    ("#### $42", None),
    ("#### forty-two", None),
    ("### 42", None),
    ("The answer is 42", None),
    ("#### - 42", None),
    ("####\n42", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "answer"), TABLE)
def test_extract(text: str, answer: str | None) -> None:
    assert GSM8KAccuracy.extract(text) == answer


@pytest.mark.parametrize(
    ("pred", "target", "score"),
    [
        ("#### 1,000", "#### 1000", 1.0),
        ("#### 18", "#### 18.0", 0.0),
        ("#### 18.", "#### 18", 0.0),
        ("#### -18", "#### 18", 0.0),
        ("18", "#### 18", 0.0),
        ("18 - 1 = 17\n#### 17\nand so on #### 18", "#### 18", 0.0),
    ],
)
def test_score(pred: str, target: str, score: float) -> None:
    assert GSM8KAccuracy.score(pred, target) == score


def test_accuracy_over_several_updates_and_reset() -> None:
    metric = GSM8KAccuracy()
    metric.update(["#### 1", "#### 2"], ["#### 1", "#### 3"])
    metric.update(["#### 5"], ["#### 5"])
    assert metric.compute() == pytest.approx(2 / 3)
    assert metric.compute().dtype == torch.float32
    metric.reset()
    metric.update(["no answer"], ["#### 5"])
    assert metric.compute() == 0.0


def test_forward_returns_the_batch_value() -> None:
    metric = GSM8KAccuracy()
    assert metric(["#### 1"], ["#### 1"]) == 1.0
    assert metric(["#### 1"], ["#### 2"]) == 0.0
    assert metric.compute() == 0.5


def test_states_sum_over_ranks() -> None:
    metrics = [GSM8KAccuracy(), GSM8KAccuracy()]
    metrics[0].update(["#### 1"], ["#### 1"])
    metrics[1].update(["#### 1", "#### 1", "x"], ["#### 2"] * 3)
    states = [metric.metric_state for metric in metrics]
    merged = GSM8KAccuracy()
    for name, reduce in merged._reductions.items():  # what torchmetrics does with the states gathered from all ranks
        setattr(merged, name, reduce(torch.stack([state[name] for state in states])))
    merged._update_count = 2
    assert merged.compute() == 0.25


def test_in_a_collection() -> None:
    collection = MetricCollection({"accuracy": GSM8KAccuracy()}, prefix="val/")
    collection.update(["#### 3"], ["#### 3"])
    assert collection.compute() == {"val/accuracy": torch.tensor(1.0)}


def test_errors() -> None:
    metric = GSM8KAccuracy()
    with pytest.raises(ValueError, match="has seen no example"), pytest.warns(UserWarning, match="before the"):
        metric.compute()
    with pytest.raises(ValueError, match="2 texts for 1 targets"):
        metric.update(["a", "b"], ["#### 1"])
    with pytest.raises(ValueError, match="target 'seven' holds no answer"):
        metric.update(["#### 7"], ["seven"])
    with pytest.raises(TypeError, match="Put it into a list"):
        metric.update("#### 7", ["#### 7"])


@pytest.mark.parametrize("seed", range(20))
def test_properties(seed: int) -> None:
    rng = random.Random(seed)
    number = rng.choice([rng.randint(-(10**9), 10**9), rng.randint(-99, 99)])
    junk = "".join(rng.choice("abc 123.,-$\n#") for _ in range(30)).replace("####", "")
    text = f"{junk.rstrip('#')}\n#### {number}"
    assert GSM8KAccuracy.extract(text) == str(number)
    # Thousands separators and what follows the line never matter.
    assert GSM8KAccuracy.score(f"#### {number:,}\n{junk}", text) == 1.0
    # Another number never scores.
    assert GSM8KAccuracy.score(f"#### {number + rng.randint(1, 9)}", text) == 0.0


def test_every_published_answer_equals_itself(shared: Path) -> None:
    for name, count in (("train", 7473), ("test", 1319)):
        lines = (shared / "data" / "gsm8k" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        answers = [json.loads(line)["answer"] for line in lines]
        metric = GSM8KAccuracy()
        metric.update(answers, answers)
        assert metric.compute() == 1.0
        assert metric.total == count
        # The official rule and the plain reading (all behind the last mark) agree on the gold answers.
        assert all(GSM8KAccuracy.extract(a) == a.split("####")[-1].strip().replace(",", "") for a in answers)


# What the two rules say; each row was checked by hand.
@pytest.mark.parametrize(
    ("pred", "target", "strict", "corrected"),
    [
        ("#### 18", "#### 18", 1, 1),
        ("#### 1,800", "#### 1800", 1, 1),
        ("#### 18.0", "#### 18", 0, 1),
        ("#### 18.", "#### 18", 0, 1),
        ("####18", "#### 18", 0, 1),
        ("####  18", "#### 18", 0, 1),
        ("####\n18", "#### 18", 0, 1),
        ("#### $18", "#### 18", 0, 1),
        ("#### -$18", "#### -18", 0, 1),
        ("#### 36/2", "#### 18", 0, 1),
        ("#### 17.6", "#### 18", 0, 0),
        ("#### -18", "#### 18", 0, 0),
        ("#### 18\n#### 5", "#### 18", 1, 1),
        ("#### 5\n#### 18", "#### 18", 0, 0),
        ("#### 1,8,0,0", "#### 1800", 1, 0),
        ("####\n\n18", "#### 18", 0, 0),
        ("#### none\n18", "#### 18", 0, 0),
        ("#### ,", "#### 18", 0, 0),
        ("The answer is 18", "#### 18", 0, 0),
        ("", "#### 18", 0, 0),
    ],
)
def test_strict_and_corrected(pred: str, target: str, strict: int, corrected: int) -> None:
    assert GSM8KAccuracy().score(pred, target) == GSM8KAccuracy.score(pred, target) == strict
    assert GSM8KAccuracy(strict=False).score(pred, target) == corrected
    metric = GSM8KAccuracy(strict=False)
    metric.update([pred], [target])
    assert metric.compute() == corrected
    for each, score in ((metric, corrected), (GSM8KAccuracy(), strict)):  # what is read is what is scored
        assert (each.extract(pred) == each.extract(target)) == bool(score)


def test_corrected_refuses_targets_without_a_number() -> None:
    with pytest.raises(ValueError, match="holds no answer"):
        GSM8KAccuracy(strict=False).score("#### 1", "#### none")


def test_published_answers_are_right_by_the_corrected_rule_too(shared: Path) -> None:
    lines = (shared / "data" / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [json.loads(line)["answer"] for line in lines]
    metric = GSM8KAccuracy(strict=False)
    metric.update(answers, answers)
    assert metric.compute() == 1
