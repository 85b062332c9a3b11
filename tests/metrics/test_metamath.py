"""MetaMath's answer rules for GSM8K and MATH: tables checked by hand, and properties."""

from __future__ import annotations

import json
import random
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from lightning_pmss.metrics import MATHAccuracy, MetaMathAccuracy
from lightning_pmss.metrics.math_equivalence import equivalent, equivalent_corrected, last_boxed, strip_string

# text, strict, corrected; the strict column was read off the published code by hand
EXTRACT: list[tuple[str, int | None, Fraction | int | None]] = [
    ("The answer is: 18", 18, 18),
    ("so 3. The answer is: 18.", 18, 18),
    ("The answer is: -7", -7, -7),
    ("The answer is: 1,234", 1234, 1234),
    ("The answer is: $18 dollars", 18, 18),
    ("The answer is: 1 The answer is: 2", 2, 2),
    ("The answer is: \n 5", 5, 5),
    ("The answer is: 3/4", 1, Fraction(3, 4)),
    ("The answer is: 6/0", 6, None),
    # the faults of the published rule
    ("The answer is: 1,234,567", 1234, 1234567),
    ("The answer is: 18.50", 18, Fraction(37, 2)),
    ("The answer is: 0.5", 0, Fraction(1, 2)),
    ("The answer is: 1.5", 2, Fraction(3, 2)),
    ("The answer is: 3.50/2", 4, Fraction(7, 4)),
    ("The answer is: 1/00", None, None),
    ("The answer is: /3", None, 3),
    ("The answer is:18", None, 18),
    ("the answer is 18", None, 18),
    ("The final answer is 18.", None, 18),
    ("#### 18", None, 18),
    ("18", None, None),
    ("The answer is: none", None, None),
    ("", None, None),
]


@pytest.mark.parametrize(("text", "strict", "corrected"), EXTRACT)
def test_extract(text: str, strict: int | None, corrected: Fraction | None) -> None:
    assert MetaMathAccuracy().extract(text) == strict
    assert MetaMathAccuracy(strict=False).extract(text) == corrected


@pytest.mark.parametrize(
    ("target", "gold"),
    [
        ("x\n#### 1,800", 1800),
        ("#### -3", -3),
        ("80000", 80000),
        (" 2.5 ", Fraction(5, 2)),
        ("1/2", Fraction(1, 2)),
        ("So.\nThe answer is: 12", 12),
        ("$70", 70),
    ],
)
def test_gold(target: str, gold: Fraction) -> None:
    assert MetaMathAccuracy.gold(target) == gold


def test_scores() -> None:
    strict, corrected = MetaMathAccuracy(), MetaMathAccuracy(strict=False)
    for pred, target, by_rule, right in (
        ("The answer is: 18", "#### 18", 1, 1),
        ("The answer is: 17.6", "#### 18", 1, 0),
        ("#### 18", "#### 18", 0, 1),
        ("The answer is: 1,234,567", "#### 1,234,567", 0, 1),
        ("The answer is: 2.5", "2.5", 1, 1),
        ("The answer is: 19", "#### 18", 0, 0),
    ):
        assert (strict.score(pred, target), corrected.score(pred, target)) == (by_rule, right), pred
    strict.update(["The answer is: 18", "no"], ["#### 18", "#### 18"])
    assert strict.compute() == 0.5
    assert strict.compute().dtype == torch.float32
    with pytest.raises(ValueError, match="The target 'seven' holds no answer"):
        strict.update(["x"], ["seven"])
    with pytest.raises(TypeError, match="Put it into a list"):
        strict.update("x", ["seven"])
    with pytest.raises(ValueError, match="1 texts for 2 targets"):
        strict.update(["x"], ["1", "2"])
    with pytest.raises(ValueError, match="has seen no example"), pytest.warns(UserWarning, match="before the"):
        MetaMathAccuracy().compute()


@pytest.mark.parametrize("seed", range(20))
def test_number_properties(seed: int) -> None:
    rng = random.Random(seed)
    number = rng.choice([rng.randint(-99, 99), rng.randint(-999_999, 999_999)])
    wrong = number + rng.choice([-3, -1, 1, 2])
    for metric in (MetaMathAccuracy(), MetaMathAccuracy(strict=False)):
        assert metric.score(f"It was {wrong}.\nThe answer is: {number:,}", f"#### {number}") == 1
        assert metric.score(f"It was {number}.\nThe answer is: {wrong}", f"#### {number:,}") == 0
        assert metric.score(str(number), f"#### {number}") == 0  # without the mark
    big = rng.randint(10**6, 10**9)
    assert MetaMathAccuracy(strict=False).score(f"The answer is: {big:,}.", f"#### {big}") == 1


def test_real_gold_answers(shared: Path) -> None:
    for path in (shared / "data" / "gsm8k" / "test.jsonl", shared / "data" / "metamath" / "GSM8K_Backward.jsonl"):
        answers = [json.loads(line)["answer"] for line in path.read_text(encoding="utf-8").splitlines()]
        preds = [f"The answer is: {answer.split('####')[-1].strip()}" for answer in answers]
        corrected = MetaMathAccuracy(strict=False)
        corrected.update(preds, answers)
        assert corrected.compute() == 1
        strict = MetaMathAccuracy()
        strict.update(preds, answers)
        assert strict.compute() > 0.99  # numbers with two separators are the exception


STRIPPED = [
    ("\\dfrac12", "\\frac{1}{2}"),
    ("\\frac1{72}", "\\frac{1}{72}"),
    ("\\tfrac{3}{4}", "\\frac{3}{4}"),
    ("0.5", "\\frac{1}{2}"),
    (".5", "\\frac{1}{2}"),
    ("1/2", "\\frac{1}{2}"),
    ("01/2", "01/2"),
    ("x = 5", "5"),
    ("xyz = 5", "xyz=5"),
    ("\\sqrt3+\\sqrt{5}", "\\sqrt{3}+\\sqrt{5}"),
    ("90^\\circ", "90"),
    ("90^{\\circ}", "90"),
    ("50\\%", "50"),
    ("\\$12", "12"),
    ("5\\text{ cm}", "5"),
    ("\\left( 1, 2 \\right)", "(1,2)"),
    ("1\\!000", "1000"),
    ("", ""),
]


@pytest.mark.parametrize(("text", "stripped"), STRIPPED)
def test_strip_string(text: str, stripped: str) -> None:
    assert strip_string(text) == stripped


# first, second, published rule, corrected rule
EQUIVALENT = [
    ("\\frac{1}{2}", "1/2", True, True),
    ("(1, 2)", "\\left(1,2\\right)", True, True),
    ("0.25", "\\frac{1}{4}", False, True),
    ("\\frac{2}{4}", "\\frac{1}{2}", False, True),
    ("-\\frac{1}{2}", "\\frac{-1}{2}", False, True),
    ("-0.5", "-1/2", False, True),
    ("2.0", "2", False, True),
    ("1,000", "1000", False, True),
    ("1{,}000", "1000", False, True),
    ("(1,000)", "(1000)", False, False),  # a pair or a number: not known
    ("5\\text{cm}", "5", False, True),
    ("\\text{Monday}", "Monday", False, True),
    ("$5$", "5", False, True),
    ("f(x) = 2x", "2x", False, True),
    ("3\\text{ a}\\text{ b}", "3", False, True),
    ("\\frac", "\\frac", True, True),  # the rule falls back to the texts as they are
    ("3", "4", False, False),
    ("x+1", "x-1", False, False),
    ("\\frac{1}{0}", "\\frac{2}{0}", False, False),
    ("10", "1", False, False),
    ("1,2", "12", False, False),
]


@pytest.mark.parametrize(("first", "second", "strict", "corrected"), EQUIVALENT)
def test_equivalent(first: str, second: str, strict: bool, corrected: bool) -> None:
    assert equivalent(first, second) == equivalent(second, first) == strict
    assert equivalent_corrected(first, second) == equivalent_corrected(second, first) == corrected


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        ("so $\\boxed{5}$ and $\\boxed{\\frac{1}{2}}$.", "\\frac{1}{2}"),
        ("\\boxed{a{b}c", None),
        ("\\boxed 5 is", "5"),
        ("\\fbox{7}", "7"),
        ("nothing", None),
    ],
)
def test_last_boxed(text: str, boxed: str | None) -> None:
    assert last_boxed(text) == boxed


MATH = [
    # pred, target, strict, corrected
    ("Thus.\nThe answer is: $\\frac{1}{2}$", "\\boxed{\\frac12}", 0, 1),
    ("The answer is: \\frac{1}{2}.", "\\boxed{\\frac12}", 1, 1),
    ("The answer is: 5.\nMore text", "\\boxed{5}", 1, 1),
    ("The answer is: 5. Thus", "\\boxed{5}", 0, 1),
    ("The answer is: 4 or rather The answer is: 5", "\\boxed{5}", 1, 1),
    ("so \\boxed{5}", "\\boxed{5}", 0, 1),
    ("The answer is: 5", "\\boxed 5", 0, 1),
    ("The answer is: 5", "\\fbox{5}", 0, 1),
    ("The answer is: 5", "one.\nThe answer is: 5", 1, 1),
    ("The answer is: 5", "5", 1, 1),
    ("5", "5", 0, 0),
    ("", "5", 0, 0),
]


@pytest.mark.parametrize(("pred", "target", "strict", "corrected"), MATH)
def test_math_scores(pred: str, target: str, strict: float, corrected: float) -> None:
    assert MATHAccuracy().score(pred, target) == strict
    assert MATHAccuracy(strict=False).score(pred, target) == corrected


def test_math_errors() -> None:
    for bad in (" ", "\\boxed{", "\\boxed{}"):
        with pytest.raises(ValueError, match="holds no answer"):
            MATHAccuracy().update(["x"], [bad])


@pytest.mark.parametrize("seed", range(30))
def test_equivalence_properties(seed: int) -> None:
    rng = random.Random(seed)
    pieces = [
        "\\frac",
        "{1}",
        "{x}",
        "3",
        "\\sqrt",
        "0.5",
        " ",
        "\\text{ cm}",
        "/",
        "=",
        "(",
        ",",
        "\\%",
        "^\\circ",
        ".",
    ]
    text = "".join(rng.choices(pieces, k=rng.randint(1, 6)))
    for rule in (equivalent, equivalent_corrected):
        assert rule(text, text)
    value = Fraction(rng.randint(-50, 50), rng.choice([1, 2, 4, 5, 8]))
    times = rng.randint(2, 5)
    forms = [
        f"{value.numerator / value.denominator}",
        f"\\frac{{{value.numerator * times}}}{{{value.denominator * times}}}",
        f"{value.numerator}/{value.denominator}",
    ]
    for first in forms:
        for second in forms:
            assert equivalent_corrected(first, second)
        assert not equivalent_corrected(first, f"\\frac{{{value.numerator + 1}}}{{{value.denominator}}}")
