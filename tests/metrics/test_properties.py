"""What holds for every metric, on random texts: no crash, order and parts are of no account, gold answers are right."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning_pmss.metrics import CommonsenseAccuracy, DROPScore, GSM8KAccuracy, MATHAccuracy, MetaMathAccuracy

Pair = tuple[str, Any]
_PIECES = [
    "#### ", "The answer is: ", "the correct answer is ", "\\boxed{", "}", "$", "1,000", "-3", "4.50", "1/2", "/0", "\n",
    "true", "answer2", " the ", "Raiders", "; ", "\\frac{1}{2}", ".", ",", "####", "١٢", "é", "<<1+1=2>>", "9" * 400, "-",
]  # fmt: skip


def _number(rng: random.Random) -> str:
    return str(rng.randint(-(10**6), 10**6))


def _gsm8k(rng: random.Random) -> Pair:
    number = _number(rng)
    return f"Work {rng.random()}.\n#### {number}", f"Other work.\n#### {number}"


def _metamath(rng: random.Random) -> Pair:
    number = _number(rng)
    return f"Work.\nThe answer is: {number}", f"#### {number}"


def _math(rng: random.Random) -> Pair:
    answer = rng.choice([_number(rng), "\\frac{3}{4}", "x^2", "(1,2]", "\\sqrt{2}"])
    return f"Work.\nThe answer is: {answer}", f"So $\\boxed{{{answer}}}$."


def _commonsense(rng: random.Random) -> Pair:
    task, label = rng.choice(
        [("boolq", "true"), ("piqa", "solution2"), ("ARC-Easy", "answer4"), ("hellaswag", "ending1")]
    )
    return f"the correct answer is {label}", (task, label)


def _drop(rng: random.Random) -> Pair:
    spans = [rng.choice(["Raiders", "10", "3.5 yards", "May 1939", "the Bears"]) + f" {rng.randint(0, 9)}"]
    return spans[0].upper(), [spans, ["nothing else"]]


CASES: list[tuple[Callable[[bool], Any], Callable[[random.Random], Pair]]] = [
    (lambda strict: GSM8KAccuracy(strict), _gsm8k),
    (lambda strict: MetaMathAccuracy(strict), _metamath),
    (lambda strict: MATHAccuracy(strict), _math),
    (lambda strict: CommonsenseAccuracy(strict), _commonsense),
    (lambda strict: DROPScore(strict), _drop),
]


def _first(value: Any) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else value["exact_match"] / 100


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(8))
def test_order_parts_copies_and_gold(seed: int, case: Any, strict: bool) -> None:
    build, draw = case
    rng = random.Random(seed)
    pairs = [draw(rng) for _ in range(rng.randint(2, 12))]
    wrong = rng.randint(0, len(pairs))
    told = [(text if number >= wrong else "I do not know", target) for number, (text, target) in enumerate(pairs)]
    whole, parts = build(strict), [build(strict), build(strict)]
    whole.update(*map(list, zip(*told, strict=True)))
    # Gold answers in their format are right, a text without an answer is wrong.
    assert _first(whole.compute()) == pytest.approx((len(pairs) - wrong) / len(pairs))
    shuffled = rng.sample(told, len(told))
    cut = rng.randint(1, len(told) - 1)
    for metric, part in zip(parts, (shuffled[:cut], shuffled[cut:]), strict=True):
        for pred, target in part:
            metric.update([pred], [target])
    merged = build(strict)
    for name, reduce in merged._reductions.items():  # what torchmetrics does with the states gathered from all ranks
        setattr(merged, name, reduce(torch.stack([metric.metric_state[name] for metric in parts])))
    merged._update_count = 2
    assert str(merged.compute()) == str(whole.compute())
    for same in (copy.deepcopy(whole), pickle.loads(pickle.dumps(whole)), whole.clone()):  # noqa: S301
        assert str(same.compute()) == str(whole.compute())
        assert same.strict == strict
        assert [same.score(*pair) for pair in told] == [whole.score(*pair) for pair in told]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(12))
def test_any_text_scores_zero_or_one(seed: int, case: Any, strict: bool) -> None:
    build, draw = case
    rng = random.Random(seed)
    metric = build(strict)
    for _ in range(20):
        text = "".join(rng.choices(_PIECES, k=rng.randint(0, 8)))
        _, target = draw(rng)
        score = metric.score(text, target)
        assert score in (0.0, 1.0)
        assert metric.score(text, target) == score  # nothing is remembered


@pytest.mark.parametrize("seed", range(30))
def test_gsm8ks_corrected_rule_accepts_what_the_strict_one_does(seed: int) -> None:
    rng = random.Random(seed)
    number = rng.randint(-(10**9), 10**9)
    gold = f"#### {number}"
    corrected = GSM8KAccuracy(strict=False)
    tail = rng.choice(["", ".", ".0", ".00", " pens", "\nQuestion: next\n#### 5", " dollars.", "\\"])
    mark = rng.choice(["####", "#### ", "####  ", "####\n", "#### $", "####$", "#### \\$"])
    assert corrected.score(f"Work\n{mark}{number:,}{tail}", gold) == 1
    assert corrected.score(f"Work\n{mark}{number + rng.choice([-1, 1])}{tail}", gold) == 0
    assert corrected.score(f"Work: {number}", gold) == 0
    if GSM8KAccuracy.score(f"{mark}{number}{tail}", gold):
        assert corrected.score(f"{mark}{number}{tail}", gold)
