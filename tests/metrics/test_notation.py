"""One number in many notations: the corrected rules read it whole or not at all, the published rules stay as they are."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest

from lightning_pmss.metrics import DROPScore, GSM8KAccuracy, MATHAccuracy, MetaMathAccuracy
from lightning_pmss.metrics.exact import exact_number, only_number

HALF = Fraction(1, 2)

# What is written, and the number that is meant; None where that is not known. Checked by hand.
TABLE: dict[str, list[tuple[str, int | Fraction | None]]] = {
    "thousands": [
        ("9,500", 9500),
        (r"9{,}500", 9500),
        (r"9\text{,}500", 9500),
        (r"9\,500", 9500),
        (r"9,\!500", 9500),
        (r"9\!500", 9500),
        (r"9\;500", 9500),
        (r"9\ 500", 9500),
        ("9~500", 9500),
        ("9&nbsp;500", 9500),
        ("9 500", 9500),
        ("9\u00a0500", 9500),
        ("9\u2009500", 9500),
        ("9\u202f500", 9500),
        ("9\u2007500", 9500),
        ("9\u200b500", 9500),
        ("9'500", 9500),
        ("9\u2019500", 9500),
        ("9_500", 9500),
        ("9\u066c500", 9500),
        ("\uff19\uff0c\uff15\uff10\uff10", 9500),
        ("1,234,567.89", Fraction(123456789, 100)),
        ("9 500 000", 9500000),
        ("1,00,000", 100000),
        ("9.500,00", 9500),
        ("9 500,50", 9500 + HALF),
        ("1.234.567", 1234567),
        ("9.500", 9 + HALF),
        ("9,5", None),
        ("9,50", None),
        ("9,5000", None),
        (r"9{,}5", None),
        ("0,500", None),
        ("1,8,0,0", None),
        ("12,345,67", None),
        ("12 345 6", None),
        ("9, 500", None),
        (",5", None),
        ("9.5.1", None),
        ("9..5", None),
    ],
    "two numbers": [
        ("18 18", 18),
        ("9, 10", 9),
        ("2020 5", 2020),
        ("5 100-pound bags", 5),
        ("9 $50 bills", 9),
        ("9 dollars and 50 cents", 9),
        ("5 to 10", 5),
    ],
    "signs": [
        ("-9", -9),
        ("\u22129", -9),
        ("\u20139", -9),
        ("\u20149", -9),
        ("\uff0d9", -9),
        ("- 9", -9),
        ("-$9", -9),
        ("$-9", -9),
        ("\u2212\u20ac9", -9),
        ("(-9)", -9),
        ("-**9**", -9),
        (r"\boxed{-9}", -9),
        ("x = \u22129", -9),
        ("profit -9", -9),
        ("+9", 9),
        ("profit - 9", 9),
        ("COVID-19", 19),
        ("9-inch", 9),
        ("--9", None),
        ("\u00b19", None),
        (r"\pm 9", None),
        ("5-3", None),
        ("5\u201310", None),
    ],
    "currencies and units": [
        ("$9,500", 9500),
        (r"\$9{,}500", 9500),
        ("9,500$", 9500),
        ("9,500 $", 9500),
        ("9500\u20ac", 9500),
        ("9500 \u20ac", 9500),
        ("\uff04\uff19", 9),
        ("US$9", 9),
        ("Rs.9", 9),
        ("CHF 9'500.50", 9500 + HALF),
        ("9500 dollars", 9500),
        ("50%", 50),
        (r"50 \%", 50),
        ("9kg", 9),
        ("9m\u00b2", 9),
        ("9 km/h", 9),
        ("9/hour", 9),
        (r"9\text{ cm}", 9),
        (r"9\,\mathrm{cm}", 9),
        (r"90^\circ", 90),
        ("90\u00b0", 90),
        ("9th", 9),
        ("9$50", None),
        ("9:30", None),
        ("5:00 pm", 5),
        ("9:00am", 9),
        ("9,500/-", 9500),
        ("9k", None),
        ("9M", None),
    ],
    "around": [
        ("9.", 9),
        ("9,", 9),
        ("9!", 9),
        ("9...", 9),
        ("(9)", 9),
        ("[9]", 9),
        ("**9**", 9),
        ("*9*", 9),
        ("__9__", 9),
        ("`9`", 9),
        ("$9$", 9),
        (r"\(9\)", 9),
        (r"\boxed{9{,}500}", 9500),
        (r"\boxed{\text{9}}", 9),
        (r"\boxed{\frac{9}{2}}", 4 + HALF),
        (r"\textcolor{red}{\boxed{9}}", 9),
        (r"9 \implies x", 9),
        (r"\mathbf{9}", 9),
        ("9\\", 9),
        ("about 9", 9),
        ("~9", 9),
        ("so, 9", 9),
        ("9 (36/2)", 9),
        ("<<3*3=9>>9", 9),
        ("x_1 = 9", 9),
    ],
    "fractions and powers": [
        ("36/2", 18),
        ("1/2", HALF),
        ("\u00bd", HALF),
        (".5", HALF),
        (r"\frac{1}{2}", HALF),
        (r"-\dfrac12", -HALF),
        ("1 1/2", 1 + HALF),
        ("1\u00bd", 1 + HALF),
        ("1 and 1/2", 1 + HALF),
        (r"1\frac{1}{2}", 1 + HALF),
        ("9.5e3", 9500),
        (r"9.5 \times 10^3", 9500),
        ("9.5 \u00d7 10\u00b3", 9500),
        ("9.5*10^{3}", 9500),
        ("10^3", 1000),
        ("9\u00b2", 81),
        ("10**3", 1000),
        ("9 million", 9000000),
        ("9 hundred thousand", 900000),
        ("1/0", None),
        ("1 5/4", None),
        (r"\frac{x}{3}", None),
        ("9/5/2020", None),
        ("10^999999999", None),
        ("1e999999999", None),
        ("9^9^9", None),
        ("0.333...", None),
        (r"0.\overline{3}", None),
        (r"2\sqrt{3}", None),
        (r"\sqrt{9}", None),
        (r"9\pi", None),
        ("9\u03c0", None),
        ("x^2", None),
    ],
    "calculations": [
        ("3 * 4 = 12", 12),
        ("$18 + $2 = $20", 20),
        ("x = 3 + 4 = 7", 7),
        ("18 = 18", 18),
        ("3*4", None),
        ("9 x 500", None),
        ("2(9)", None),
    ],
    "none": [("forty-two", None), (",", None), ("9" * 5000, None)],
}
ROWS = [pytest.param(text, value, id=f"{kind}: {text[:20]}") for kind, rows in TABLE.items() for text, value in rows]


def test_the_case_of_the_users() -> None:
    corrected = GSM8KAccuracy(strict=False)
    assert corrected.score(r"#### 9{,}500", "#### 9") == 0
    assert corrected.score(r"#### 9{,}500", "#### 9,500") == 1


@pytest.mark.parametrize(("text", "value"), ROWS)
def test_table(text: str, value: Fraction | None) -> None:
    assert exact_number(text) == value
    for metric, pred in (
        (GSM8KAccuracy(strict=False), f"Work: 3\n#### {text}\n7"),
        (MetaMathAccuracy(strict=False), f"Work: 3\nThe answer is: {text}\n7"),
    ):
        assert metric.extract(pred) == value
        for gold in {1, 3, 5, 9, 9500, *([value] if value is not None else [])}:
            assert metric.score(pred, f"#### {gold}") == float(gold == value)


# What the published expressions give was read off them by hand.
@pytest.mark.parametrize(
    ("text", "gsm8k", "metamath"),
    [
        (r"9{,}500", "9", 9),
        (r"9\,500", "9", 9),
        ("9 500", "9", 9),
        ("9\u202f500", "9", 9),
        ("9,500 $", "9500", 9500),
        ("\u22129", None, 9),
        ("9,5", "95", 95),
        ("1,8,0,0", "1800", 18),
        ("9.500,00", "9.50000", 10),
        (r"\boxed{9}", None, 9),
        ("1 1/2", "1", 1),
        ("9.5e3", "9.5", 10),
    ],
)
def test_the_published_rules_are_as_published(text: str, gsm8k: str | None, metamath: int) -> None:
    assert GSM8KAccuracy.extract(f"#### {text}") == GSM8KAccuracy().extract(f"#### {text}") == gsm8k
    assert MetaMathAccuracy().extract(f"The answer is: {text}") == metamath


@pytest.mark.parametrize(
    ("target", "strict", "corrected"),
    [
        ("#### 9,500", 9500, 9500),
        (r"#### 9{,}500", 9, 9500),
        (r"The answer is: \frac{1}{2}", 1, HALF),
        ("$9,500", 9500, 9500),
    ],
)
def test_gold_numbers_are_read_by_their_rule(target: str, strict: int, corrected: Fraction) -> None:
    assert MetaMathAccuracy().gold(target) == strict
    assert MetaMathAccuracy(strict=False).gold(target) == MetaMathAccuracy.gold(target) == corrected


@pytest.mark.parametrize("seed", range(20))
def test_every_spelling_is_that_number_and_no_other(seed: int) -> None:
    rng = random.Random(seed)
    number = rng.choice([-1, 1]) * rng.randint(1000, 10**7)
    digits = f"{abs(number):,}"
    spelt = digits.replace(",", rng.choice(["", ",", "{,}", r"\,", "\u2009", "\u202f", "'", " ", "~"]))
    spelt = rng.choice(
        ["{}", "{}.00", "{}.", "${}", "{} $", "**{}**", "\\boxed{{{}}}", "\u20ac{}", "{} apples"]
    ).format(spelt)
    if rng.random() < 0.3:
        spelt = spelt.translate({ord(digit): ord(digit) + 0xFEE0 for digit in "0123456789"})
    spelt = (rng.choice(["-", "\u2212", "\u2013"]) if number < 0 else "") + spelt
    for metric in (GSM8KAccuracy(strict=False), MetaMathAccuracy(strict=False)):
        assert metric.score(f"#### {spelt}", f"#### {number}") == 1, spelt
        for other in (-number, number + 1, int(digits.split(",")[0]), number * 1000):
            assert metric.score(f"#### {spelt}", f"#### {other}") == 0, spelt


# first, second, equal by the corrected rule
MATH = [
    (r"9{,}500", "9500", True),
    (r"9\,500", "9,500", True),
    ("9\u2009500", "9500", True),
    ("\u22129", "-9", True),
    ("9500 \u20ac", "9500", True),
    (r"\$9{,}500", "9500", True),
    (r"9.5 \times 10^3", "9500", True),
    ("2^{10}", "1024", True),
    ("1\u00bd", r"\frac{3}{2}", True),
    (r"1\frac{1}{2}", "1.5", True),
    (r"9{,}500\text{ cm}", "9500", True),
    (r"9{,}500", "9", False),
    ("1 1/2", "11/2", False),
    ("1 1/2", r"\frac{3}{2}", True),
    (r"1 1/2\text{ cm}", "11/2", False),
    ("\u22129", "9", False),
    ("5x", "5", False),
    (r"5\sqrt{2}", "5", False),
    ("(1,000)", "(1000)", False),
    ("1,2", "12", False),
    ("9" * 5000, "9", False),
]


@pytest.mark.parametrize(("first", "second", "equal"), MATH)
def test_math(first: str, second: str, equal: bool) -> None:
    metric = MATHAccuracy(strict=False)
    assert metric.score(f"The answer is: {first}", f"\\boxed{{{second}}}") == equal
    assert metric.score(f"so \\boxed{{{second}}}", f"\\boxed{{{first}}}") == equal


@pytest.mark.parametrize(
    ("pred", "gold", "equal"),
    [
        ("9\u2009500", "9500", True),
        (r"9{,}500 yards", "9500 yards", True),
        ("\u22125", "-5", True),
        ("\u22125", "5", False),
        ("$9,500", "9500", True),
        ("\u00bd", "0.5", True),
        ("1/2", "12", False),
        ("9:30", "930", False),
        ("9,5", "95", False),
        ("10\u201312", "10-12", True),
        ("Carr\u2019s", "Carr's", True),
    ],
)
def test_drop(pred: str, gold: str, equal: bool) -> None:
    assert DROPScore(strict=False).score(pred, [(gold,)]) == equal
    assert DROPScore(strict=False).score(pred, [(pred,)]) == 1


def test_only_a_number_is_one() -> None:
    assert only_number(" $9,500. ") == 9500
    for text in ("9 pens", "x = 9", "seven 7", "9, 10", "(9)", ""):
        assert only_number(text) is None
