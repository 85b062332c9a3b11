"""DROP's scores: tables checked by hand, a second implementation, and properties."""

from __future__ import annotations

import itertools
import json
import random
import re
import string
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_pmss.metrics import DROPScore
from lightning_pmss.metrics.drop import answer_strings, answer_type, normalise

# text, strict, corrected; the strict column was worked out by hand from the five steps of the official script
NORMAL = [
    ("The 49ers", "49ers", "49ers"),
    ("a Raiders' fan", "raiders fan", "raiders fan"),
    ("10", "10.0", "10.0"),
    ("10.50", "10.5", "10.5"),
    ("$41,809", "41809.0", "41809.0"),
    ("1,962,059", "1962059.0", "1962059.0"),
    ("38-yard", "38.0 yard", "38.0 yard"),
    ("three-point", "three point", "three point"),
    ("10 - 12", "10.0 12.0", "10.0 12.0"),
    ("11-4", "11.0 4.0", "11.0 4.0"),
    ("10%", "10.0", "10.0"),
    ("5.", "5.0", "5.0"),
    ("An apple, a day", "apple day", "apple day"),
    ("   1939", "1939.0", "1939.0"),
    ("5 May 2012", "5.0 may 2012.0", "5.0 may 2012.0"),
    ("U.S.", "us", "us"),
    ("the", "", ""),
    ("", "", ""),
    # the faults of the official rule
    ("10\n\nPassage", "10 passage", "10.0 passage"),
    ("10.5%", "105.0", "10.5"),
    ("$10.5", "105.0", "10.5"),
    ("10.5.", "105.0", "10.5"),
    ("-5", "5.0", "-5.0"),
    ("1_000", "1000.0", "1000.0"),
    ("infinity", "inf", "infinity"),
    ("x\ty", "x y", "x y"),
]


@pytest.mark.parametrize(("text", "strict", "corrected"), NORMAL)
def test_normalise(text: str, strict: str, corrected: str) -> None:
    assert normalise(text) == strict
    assert normalise(text, strict=False) == corrected


# prediction, gold answers, exact match, F1: worked out by hand
SCORES: list[tuple[str | list[str], list[tuple[str, ...]], float, float]] = [
    ("42", [("42",)], 1, 1),
    ("42.0", [("42",)], 1, 1),
    ("42 yards", [("42",)], 0, 0.67),  # precision 1/2, recall 1
    ("yards", [("42",)], 0, 0),
    ("43 yards", [("42 yards",)], 0, 0),  # a shared word, but the number is another
    ("forty-two yards", [("yards",)], 0, 0.5),  # gold without number: words count; precision 1/3
    ("Philip Rivers", [("Rivers",)], 0, 0.67),
    ("the Philip Rivers", [("philip rivers",)], 1, 1),
    ("Rivers", [("Carr",), ("Rivers", "Carr")], 0, 0.5),  # one of two spans, in the second gold answer
    (["Carr", "Rivers"], [("Rivers", "Carr")], 1, 1),  # order does not matter
    (["Carr", "Carr"], [("Carr",)], 0, 0.5),  # same set, another number of spans
    (["Carr", "Carr"], [("Carr", "Carr")], 1, 1),
    (["a b", "c"], [("c d", "a b")], 0, 0.83),  # aligned crosswise: 1 and 2/3
    (["x", "y", "z"], [("x",)], 0, 0.33),
    ([], [("x",)], 0, 0),
    ("", [("the",)], 1, 1),  # both normalise to nothing
    ("", [("x",)], 0, 0),  # precision 1, recall 0
    ("x", [("the",)], 0, 0),  # precision 0, recall 1
    ("5", [(" ",), ("5",)], 1, 1),  # the blank gold answer is skipped
    ("", [("",)], 0, 0),  # nothing but blanks: no score, as in the script
    ("10\n\nPassage: more", [("10",)], 0, 0),
    ("12.5.", [("12.5",)], 0, 0),
]


@pytest.mark.parametrize(("pred", "target", "match", "f1"), SCORES)
def test_scores(pred: str | list[str], target: list[tuple[str, ...]], match: float, f1: float) -> None:
    metric = DROPScore()
    metric.update([pred], [target])
    assert {name: float(value) for name, value in metric.compute().items()} == {
        "exact_match": 100.0 * match,
        "f1": pytest.approx(100 * f1, abs=1e-4),
    }
    assert metric.score(pred, target) == match
    assert metric.score_f1(pred, target) == pytest.approx(f1)


@pytest.mark.parametrize(
    ("pred", "target", "match", "f1"),
    [
        ("10\n\nPassage: more", [("10",)], 1, 1),
        ("12.5.", [("12.5",)], 1, 1),
        ("$12.5", [("12.5",)], 1, 1),
        ("-5", [("5",)], 0, 0),
        (" 7\n", [("7",)], 1, 1),
        ("42 yards", [("42",)], 0, 2 / 3),  # not rounded
        ("nan", [("mother",)], 0, 0),
        ("my nan", [("nan",)], 0, 2 / 3),  # a word, not a number
    ],
)
def test_corrected(pred: str, target: list[tuple[str, ...]], match: float, f1: float) -> None:
    metric = DROPScore(strict=False)
    assert metric.score(pred, target) == match
    assert metric.score_f1(pred, target) == pytest.approx(f1)


def test_separator() -> None:
    target = [("Carr", "Rivers")]
    assert DROPScore().score("Rivers; Carr", target) == 0
    assert DROPScore(separator=";").score("Rivers; Carr", target) == 1
    assert DROPScore(separator=";").score(["Rivers; Carr"], target) == 0
    with pytest.raises(ValueError, match="separator=''"):
        DROPScore(separator="")


def _best_sum(table: np.ndarray) -> float:
    """The largest sum of a one-to-one assignment, by trying all of them."""
    rows, columns = table.shape
    if rows > columns:
        return _best_sum(table.T)
    return max(sum(table[i, j] for i, j in enumerate(order)) for order in itertools.permutations(range(columns), rows))


def _second(pred: str | list[str], target: list[tuple[str, ...]]) -> tuple[float, float]:
    """The official rule once more, in other words, and with every assignment tried."""

    def number(text: str) -> bool:
        try:
            float(text)
        except ValueError:
            return False
        return True

    def clean(span: str) -> str:
        words = []
        for piece in span.replace("-", " ").split(" "):
            word = piece.lower()
            word = word if number(word) else re.sub(f"[{re.escape(string.punctuation)}]", "", word)
            word = str(float(word)) if number(word) else word
            words += re.sub(r"\b(an|a|the)\b", " ", word).split()
        return " ".join(words)

    best = [0.0, 0.0]
    for gold in target:
        left = [clean(span) for span in ([pred] if isinstance(pred, str) else pred)]
        right = [clean(span) for span in gold]
        table = np.zeros((len(right), len(left)))
        for (i, g), (j, p) in ((a, b) for a in enumerate(right) for b in enumerate(left)):
            gs, ps = set(g.split()), set(p.split())
            numbers = set(filter(number, gs))
            if not numbers or numbers & ps:
                precision = len(gs & ps) / len(ps) if ps else 1
                recall = len(gs & ps) / len(gs) if gs else 1
                table[i, j] = 0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)
        f1 = _best_sum(table) / max(table.shape)
        if gold[0].strip():
            best = [
                max(best[0], float(sorted(set(left)) == sorted(set(right)) and len(left) == len(right))),
                max(best[1], float(np.round(f1, 2))),
            ]
    return best[0], best[1]


def _perturbed(answer: str, rng: random.Random) -> str | list[str]:
    words = answer.split(" ")
    choices = [
        answer,
        answer.upper(),
        "the " + answer,
        answer + ".",
        answer + "\n\nPassage: next",
        " ".join(words[:-1]),
        " ".join(rng.sample(words, len(words))),
        answer + " " + rng.choice(["yards", "10", "2.5", "and"]),
        answer.replace(" ", "-"),
        [answer, rng.choice(words)],
        words,
        answer.split(" and "),
        str(rng.randint(0, 30)),
        f"${answer}%",
        "",
    ]
    return rng.choice(choices)


def _dev(shared: Path) -> list[list[tuple[str, ...]]]:
    lines = (shared / "data" / "drop" / "drop_v0_dev_250.jsonl").read_text(encoding="utf-8").splitlines()
    return [[(answer,) for answer in json.loads(line)["ref_text"].split("|")] for line in lines]


def _fixture(shared: Path) -> list[list[tuple[str, ...]]]:
    passages = json.loads((shared / "data" / "drop" / "drop_fixture.json").read_text(encoding="utf-8"))
    return [[answer_strings(pair["answer"])[0]] for passage in passages.values() for pair in passage["qa_pairs"]]


def test_second_implementation_agrees_on_real_answers(shared: Path) -> None:
    rng = random.Random(0)
    targets = (_dev(shared) + _fixture(shared)) * 6
    # Some questions with several spans, made from the alternatives.
    targets += [[tuple(gold[0] for gold in target)] for target in targets if len(target) > 1]
    preds = [_perturbed(rng.choice(rng.choice(target)), rng) for target in targets]
    metric = DROPScore()
    for pred, target in zip(preds, targets, strict=True):
        assert (metric.score(pred, target), metric.score_f1(pred, target)) == _second(pred, target), (pred, target)
    metric.update(preds, targets)
    second = np.mean([_second(pred, target) for pred, target in zip(preds, targets, strict=True)], axis=0)
    assert metric.compute()["exact_match"] == pytest.approx(100 * second[0], rel=1e-6)
    assert metric.compute()["f1"] == pytest.approx(100 * second[1], rel=1e-6)
    assert 5 < metric.compute()["exact_match"] < 80  # the perturbations hit and miss


def test_every_gold_answer_scores_full(shared: Path) -> None:
    targets = _dev(shared) + _fixture(shared)
    for strict in (True, False):
        metric = DROPScore(strict=strict)
        metric.update([target[-1] for target in targets], targets)
        assert {name: float(value) for name, value in metric.compute().items()} == {"exact_match": 100, "f1": 100}


_WORDS = ["the", "a", "Raiders", "49ers", "10", "3.5", "-2", "1,000", "yards", "U.S.", "twenty-two", "$5"]


def _random_spans(rng: random.Random, least: int = 1) -> list[str]:
    return [" ".join(rng.choices(_WORDS, k=rng.randint(1, 4))) for _ in range(rng.randint(least, 4))]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("seed", range(40))
def test_properties(seed: int, strict: bool) -> None:
    rng = random.Random(seed)
    metric = DROPScore(strict=strict)
    pred, gold, other = _random_spans(rng, 0), tuple(_random_spans(rng)), tuple(_random_spans(rng))
    match, f1 = metric.score(pred, [gold]), metric.score_f1(pred, [gold])
    assert 0 <= f1 <= 1
    assert match in (0.0, 1.0)
    if match:
        assert f1 == 1
    # The order of the spans and of the gold answers is of no account.
    assert metric.score(rng.sample(pred, len(pred)), [tuple(rng.sample(gold, len(gold)))]) == match
    assert metric.score_f1(rng.sample(pred, len(pred)), [tuple(rng.sample(gold, len(gold)))]) == pytest.approx(f1)
    assert metric.score_f1(pred, [gold, other]) == metric.score_f1(pred, [other, gold])
    # A further gold answer never lowers a score; a gold answer itself scores full.
    assert metric.score_f1(pred, [gold, other]) >= f1
    assert metric.score(pred, [gold, other]) >= match
    assert metric.score(gold, [other, gold]) == 1
    # Normalising twice is normalising once, but for the sign that the official rule drops.
    once = [normalise(span, strict) for span in gold]
    assert [normalise(span, strict) for span in once] == once


@pytest.mark.parametrize(
    ("spans", "kind"),
    [
        (("4",), "number"),
        (("4.5",), "number"),
        (("Carr",), "span"),
        (("4 yards",), "span"),
        (("Carr", "4"), "spans"),
        (("  1939",), "date"),
        (("5 May 2012",), "date"),
        ((" May 2012",), "date"),
        ((" May ",), "date"),
        (("May 2012",), "span"),
        (("  ",), "span"),
        (("5 yards 20",), "span"),
    ],
)
def test_answer_type(spans: tuple[str, ...], kind: str) -> None:
    assert answer_type(spans) == kind


def test_answer_strings() -> None:
    date = {"day": "", "month": "May", "year": "1939"}
    assert answer_strings({"number": "4", "date": date, "spans": ["x"]}) == (("4",), "number")
    assert answer_strings({"number": "", "date": date, "spans": ["x"]}) == (("x",), "span")
    assert answer_strings({"number": "", "date": date, "spans": ["x", "y"]}) == (("x", "y"), "spans")
    assert answer_strings({"number": "", "date": date, "spans": []}) == ((" May 1939",), "date")
    assert answer_strings({"number": "", "date": {}, "spans": []}) == (("  ",), "date")
    with pytest.raises(ValueError, match="neither 'number' nor"):
        answer_strings({"number": ""})


def test_per_type() -> None:
    metric = DROPScore(by_type=True)
    metric.update(
        ["4", "5", "Carr", ["x", "y"], "1939"],
        [[("4",)], [("4",), ("four",)], [("Derek Carr",)], [("x", "y")], [("  1939",)]],
    )
    scores = {name: round(float(value), 4) for name, value in metric.compute().items()}
    # The second question's type is that of its last gold answer: both answers reach the maximum, 0.
    assert scores == {
        "exact_match": 60.0,
        "f1": 73.4,
        "exact_match_number": 100.0,
        "f1_number": 100.0,
        "exact_match_span": 0.0,
        "f1_span": 33.5,
        "exact_match_spans": 100.0,
        "f1_spans": 100.0,
        "exact_match_date": 100.0,
        "f1_date": 100.0,
    }


def test_states_of_several_ranks_equal_one_exactly() -> None:
    rng = random.Random(3)
    preds: list[str | list[str]] = [_random_spans(rng) for _ in range(31)]
    targets = [[tuple(_random_spans(rng))] for _ in range(31)]
    whole, parts = DROPScore(strict=False), [DROPScore(strict=False) for _ in range(3)]
    whole.update(preds, targets)
    for rank, part in enumerate(parts):
        part.update(preds[rank::3], targets[rank::3])
    merged = DROPScore(strict=False)
    reduce = merged._reductions["counts"]
    assert callable(reduce)
    merged.counts = reduce(torch.stack([part.counts for part in parts]))
    merged._update_count = 1
    assert merged.compute() == whole.compute()


def test_lists_from_a_file_do_as_tuples() -> None:
    assert DROPScore().score("x", [["x"]]) == 1.0


def test_errors() -> None:
    metric = DROPScore()
    with pytest.raises(ValueError, match="has seen no example"), pytest.warns(UserWarning, match="before the"):
        metric.compute()
    with pytest.raises(ValueError, match="2 texts for 1 targets"):
        metric.update(["a", "b"], [[("a",)]])
    with pytest.raises(TypeError, match="Put it into a list"):
        metric.update("a", [[("a",)]])
    for bad in ([], [()], ["1980"], "1980"):
        with pytest.raises(ValueError, match="not a list of gold answers"):
            metric.update(["a"], [bad])  # type: ignore[list-item]
