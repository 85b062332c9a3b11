"""LLM-Adapters' answer rule: a table checked by hand, properties, and the real rows."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from lightning_pmss.metrics import CommonsenseAccuracy
from lightning_pmss.metrics.commonsense import TASK_LABELS, TASKS

# text, gold label, what the published rule takes, what the corrected one takes
TABLE = [
    ("the correct answer is true", "true", "true", "true"),
    ("the correct answer is answer3", "answer3", "answer3", "answer3"),
    (" the correct answer is solution2\n\n### Instruction:", "solution2", "solution2", "solution2"),
    ("ending4", "ending4", "ending4", "ending4"),
    ("option1 option1", "option1", "option1", "option1"),
    # the faults of the published rule
    ("untrue", "false", "true", None),
    ("a falsehood", "true", "false", None),
    ("answer12", "answer1", "answer1", None),
    ("answer1/answer2: the correct answer is answer2", "answer2", "answer1", "answer2"),
    ("not answer1 but answer2", "answer2", "answer1", None),
    ("The correct answer is True.", "true", None, "true"),
    ("Answer 3", "answer3", None, "answer3"),
    ("the correct answer is answer1. the correct answer is answer2", "answer2", "answer1", "answer2"),
    ("none\n### Response:\nanswer2", "answer2", None, "answer2"),
    ("answer1 ### Response: answer2", "answer1", "answer1", None),
    # labels of another task are none
    ("the correct answer is option1", "solution1", None, None),
    ("answer6", "answer1", None, None),
    ("", "true", None, None),
]


@pytest.mark.parametrize(("text", "gold", "strict", "corrected"), TABLE)
def test_extract_and_score(text: str, gold: str, strict: str | None, corrected: str | None) -> None:
    for metric, answer in ((CommonsenseAccuracy(), strict), (CommonsenseAccuracy(strict=False), corrected)):
        labels = metric.gold(gold)[2]
        assert metric.extract(text, labels) == answer
        for target in (gold, f"the correct answer is {gold}"):
            assert metric.score(text, target) == float(answer == gold)


def test_per_task() -> None:
    metric = CommonsenseAccuracy(by_task=True)
    metric.update(
        ["true", "false", "answer1", "answer1", "option2"],
        [["boolq", "true"], ["boolq", "true"], ("ARC-Easy", "answer1"), ("openbookqa", "answer2"), "option2"],
    )
    scores = {name: round(float(value), 4) for name, value in metric.compute().items()}
    assert scores == {
        "accuracy": 0.6,
        "average": 0.625,  # (0.5 + 1 + 0 + 1) / 4
        "boolq": 0.5,
        "ARC-Easy": 1.0,
        "openbookqa": 0.0,
        "other": 1.0,
    }
    plain = CommonsenseAccuracy()
    plain.update(["true", "no"], ["true", "true"])
    assert plain.compute() == 0.5
    assert plain.compute().dtype == torch.float32


def test_states_sum_over_ranks() -> None:
    parts = [CommonsenseAccuracy(), CommonsenseAccuracy()]
    parts[0].update(["true"], ["true"])
    parts[1].update(["x"] * 3, [("boolq", "true")] * 3)
    merged = CommonsenseAccuracy()
    reduce = merged._reductions["counts"]
    assert callable(reduce)
    merged.counts = reduce(torch.stack([part.counts for part in parts]))
    merged._update_count = 1
    assert merged.compute() == 0.25


def test_errors() -> None:
    metric = CommonsenseAccuracy()
    with pytest.raises(ValueError, match="target 'maybe' holds no label; .* true, false, solution1"):
        metric.update(["true"], ["maybe"])
    with pytest.raises(ValueError, match="holds no label; it must be or end in one of true, false"):
        metric.update(["true"], [("boolq", "answer1")])
    with pytest.raises(ValueError, match="unknown task; the tasks are boolq, piqa"):
        metric.update(["true"], [("squad", "true")])
    with pytest.raises(TypeError, match="Put it into a list"):
        metric.update("true", ["true"])
    with pytest.raises(ValueError, match="has seen no example"), pytest.warns(UserWarning, match="before the"):
        CommonsenseAccuracy().compute()


@pytest.mark.parametrize("seed", range(16))
def test_properties(seed: int) -> None:
    rng = random.Random(seed)
    task = TASKS[seed % 8]
    labels = TASK_LABELS[task]
    gold, wrong = rng.sample(labels, 2)
    for metric in (CommonsenseAccuracy(), CommonsenseAccuracy(strict=False)):
        assert metric.score(f"the correct answer is {gold}", (task, gold)) == 1
        assert metric.score(f"the correct answer is {wrong}", (task, gold)) == 0
        assert metric.score("I do not know", (task, gold)) == 0
        # What follows a stated answer, without a further statement, is of no account.
        assert metric.score(f"the correct answer is {gold}\nor {wrong}", (task, gold)) == 1


def test_every_published_row_scores(shared: Path) -> None:
    folder = shared / "data" / "commonsense"
    for path in sorted(folder.glob("*/test.json")):
        rows = json.loads(path.read_text(encoding="utf-8"))
        for strict in (True, False):
            metric = CommonsenseAccuracy(strict=strict)
            metric.update([row["output"] for row in rows], [(path.parent.name, row["answer"]) for row in rows])
            assert metric.compute() == 1.0
