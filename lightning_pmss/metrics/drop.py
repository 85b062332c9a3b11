r"""DROP's exact match and F1.

They are the scores of "DROP: A Reading Comprehension Benchmark Requiring Discrete Reasoning Over Paragraphs" (Dua et al. 2019),
by the rules of the authors' script (``allenai/allennlp-reading-comprehension``, ``allennlp_rc/eval/drop_eval.py``).
"""

from __future__ import annotations

import contextlib
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from lightning_pmss.metrics.base import TextMetric, check_pairs
from lightning_pmss.metrics.exact import only_number
from lightning_pmss.metrics.notation import CURRENCY, GLUE, typography

AnswerType = Literal["number", "span", "spans", "date"]
ANSWER_TYPES: tuple[AnswerType, ...] = get_args(AnswerType)

_ARTICLE = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SIGNS = str.maketrans("", "", string.punctuation + CURRENCY)
_MONTHS = "january|february|march|april|may|june|july|august|september|october|november|december"
# The script joins day, month and year by blanks whether they are there or not: two blanks, always.
_DATE = re.compile(rf"(?=.*\w)(\d{{1,2}})? ({_MONTHS})? (\d+)?", re.IGNORECASE)
# Characters around a number in running text; a minus and a decimal point in front are part of the number.
_AROUND = re.compile(r"^[^\w.+-]*(?P<inner>.*?)[^\w]*$", re.DOTALL)
_PARTED = re.compile(r"(?<=\d)[^\w\s]+(?=\d)")
_UNIT = 1_000_000  # F1 is summed as whole millionths: exact, in whatever order ranks and batches are added


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _normalise_token(token: str) -> str:
    token = token.lower()
    if _number(token) is None:
        token = token.translate(_PUNCTUATION)
    number = _number(token)
    return " ".join(_ARTICLE.sub(" ", token if number is None else str(number)).split())


def _normalise_token_corrected(token: str) -> str:
    match = _AROUND.match(token)
    inner = match["inner"] if match else token
    number = None
    if inner[:1].isdecimal() or inner[:1] in ("+", "-", "."):  # no "nan", "infinity" or "b52"
        with contextlib.suppress(OverflowError):
            exact = only_number(inner)
            number = None if exact is None else float(exact)
    # A text does not become a number by losing its punctuation: 9:30 is not 930.
    bare = _PARTED.sub("\u00a6", inner).lower().translate(_SIGNS) if number is None else str(number)
    return " ".join(_ARTICLE.sub(" ", bare).split())


def normalise(text: str, strict: bool = True) -> str:
    """Return the form of an answer that is compared: lower case, numbers as floats, no punctuation and articles.

    Args:
        text: One span.
        strict: By the official rule; else by the corrected one, see `DROPScore`.
    """
    if strict:
        parts = [_normalise_token(token) for token in re.split(" |-", text)]
    else:
        # A hyphen separates, except as the sign of a number that stands alone.
        text = re.sub(rf"(?<=\d){GLUE}(?=\d{{3}}(?!\d))", ",", typography(text))
        parts = [_normalise_token_corrected(token) for token in re.split(r"\s+|(?<=\w)-|-(?=\D)", text)]
    return " ".join(part for part in parts if part)


def answer_type(spans: Sequence[str]) -> AnswerType:
    """Return the kind of a gold answer, as far as its strings show it.

    A span that happens to be a number, or to read like one of DROP's dates (day, month and year separated by two
    blanks, some of them empty), is classified as such: the strings do not say which field of the data they were in.
    """
    if len(spans) > 1:
        return "spans"
    text = spans[0]
    if text == text.strip() and _number(text) is not None:
        return "number"
    return "date" if _DATE.fullmatch(text) else "span"


def answer_strings(answer: Mapping[str, Any]) -> tuple[tuple[str, ...], AnswerType]:
    """Return the strings and the type of an answer of ``drop_dataset_*.json``.

    Args:
        answer: With "number", "spans" and "date"; the first filled one is used, in this order. A date without any
            part gives the blank answer that the scores skip.

    Raises:
        ValueError: If none of the three is there.
    """
    if answer.get("number"):
        return (str(answer["number"]),), "number"
    if answer.get("spans"):
        spans = tuple(str(span) for span in answer["spans"])
        return spans, "span" if len(spans) == 1 else "spans"
    if isinstance(answer.get("date"), Mapping):
        date = answer["date"]
        return (f"{date.get('day', '')} {date.get('month', '')} {date.get('year', '')}",), "date"
    raise ValueError(f"the answer {dict(answer)!r} has neither 'number' nor 'spans' nor 'date'")


def _bag_f1(pred: set[str], gold: set[str], strict: bool) -> float:
    gold_numbers = {word for word in gold if _number(word) is not None and (strict or word[-1].isdecimal())}
    if gold_numbers and not gold_numbers & pred:
        return 0.0
    shared = len(gold & pred)
    precision = shared / len(pred) if pred else 1.0
    recall = shared / len(gold) if gold else 1.0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


class DROPScore(Metric, TextMetric):
    r"""Exact match and F1 of generated answers, the best over the gold answers of each question, in 0-100.

    The official rule, per span: cut at blanks and hyphens; per token lower case, no punctuation unless the token is a
    number, numbers as ``str(float(.))``, no articles. **Exact match**: the same set of normalised spans and as many of
    them. **F1**: the tokens of a span are a set; spans are aligned one to one so that the sum of their F1 is largest; a
    pair scores 0 if the gold span has numbers and the predicted one shares none; divided by the larger number of
    spans, and rounded to two digits per question. Both are the maximum over the gold answers, each for itself; blank
    gold answers are skipped.

    ``strict=True`` keeps the known faults of that rule (it is the rule of published numbers):

    * Only a blank or a hyphen ends a token, so ``"10\nPassage"`` is no number and matches no 10. The stop at a full
      stop that common harnesses add to avoid it cuts every decimal answer.
    * ``10.5.``, ``10.5%`` and ``$10.5`` lose their point with the punctuation and become 105.
    * ``-5`` equals 5, because the hyphen separates; ``nan``, ``infinity`` and ``1_000`` are numbers.

    ``strict=False`` corrects these: a generated text ends at its first line, all white space separates, punctuation
    around a number is not part of it, a hyphen between words or numbers separates and one in front of a number is its
    sign, numbers are read in the usual notations and other texts with digits do not become numbers by losing their
    punctuation (``9:30`` is not 930, ``1/2`` not 12), and F1 is not rounded per question.

    As input to ``update`` the metric takes:

    * ``preds`` (``list[str | list[str]]``): per question one span or several. A text is cut into spans at
      ``separator``, where there is one.
    * ``targets`` (``list[list[tuple[str, ...]]]``): per question its gold answers (``answer`` and all of
      ``validated_answers``), each a sequence of spans.

    As output of ``compute`` it returns ``{"exact_match", "f1"}``, float32 scalar tensors in 0-100; with ``by_type``
    also ``exact_match_<type>`` and ``f1_<type>`` for each type that occurred. States are integers that are summed over
    ranks: the scores of several ranks equal those of one exactly.

    Args:
        strict: Score by the official rule; else by the corrected one.
        separator: Text between spans in a generated text. Null: a text is one span, as in the official script.
        by_type: Add the scores per type of answer ("number", "span", "spans", "date"; as in the script that of the last
            gold answer which reaches one of the maxima).

    Raises:
        ValueError: If the lists differ in length, a question has no gold answer, or ``compute`` has seen no example.

    Example:
        >>> from lightning_pmss.metrics import DROPScore
        >>> metric = DROPScore()
        >>> metric.update(["the 49ers", "3"], [[("49ers",)], [("4",), ("3.0", "4")]])
        >>> {name: value.item() for name, value in metric.compute().items()}
        {'exact_match': 50.0, 'f1': 75.0}
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 100.0

    counts: Tensor

    def __init__(self, strict: bool = True, separator: str | None = None, by_type: bool = False) -> None:
        super().__init__()
        if separator == "":
            raise ValueError("`DROPScore(separator='')`: give the text that separates spans, such as '; ', or null.")
        self.strict = strict
        self.separator = separator
        self.by_type = by_type
        # Per type: exact matches, millionths of F1, questions.
        self.add_state("counts", default=torch.zeros(len(ANSWER_TYPES), 3, dtype=torch.int64), dist_reduce_fx="sum")

    def _spans(self, pred: str | Sequence[str]) -> list[str]:
        if not isinstance(pred, str):
            return list(pred)
        if not self.strict:
            pred = pred.strip().split("\n", 1)[0]
        if self.separator is None:
            return [pred]
        return [part.strip() for part in pred.split(self.separator)]

    def _against(self, pred: Sequence[str], gold: Sequence[str]) -> tuple[float, float]:
        preds = [normalise(span, self.strict) for span in pred]
        golds = [normalise(span, self.strict) for span in gold]
        match = float(set(preds) == set(golds) and len(preds) == len(golds))
        pred_bags, gold_bags = [set(span.split()) for span in preds], [set(span.split()) for span in golds]
        scores = [[_bag_f1(pred_bag, gold_bag, self.strict) for pred_bag in pred_bags] for gold_bag in gold_bags]
        aligned = np.zeros(max(len(golds), len(preds)))
        if preds and golds:
            rows, columns = linear_sum_assignment(scores, maximize=True)
            aligned[rows] = np.asarray(scores)[rows, columns]
        mean = np.mean(aligned)
        # numpy's rounding, not Python's: they differ at halves such as 0.155, and the script has numpy's.
        return match, float(np.round(mean, 2) if self.strict else mean)

    def _best(self, pred: str | Sequence[str], target: Sequence[Sequence[str]]) -> tuple[float, float, AnswerType]:
        if isinstance(target, str) or not target or any(isinstance(gold, str) or not gold for gold in target):
            raise ValueError(
                f"The target {target!r} is not a list of gold answers, each a sequence of one or more spans; give for"
                " example [('1980',), ('the 1980s',)]."
            )
        spans = self._spans(pred)
        match, f1, kind = 0.0, 0.0, answer_type(target[0])
        for gold in target:
            if not gold[0].strip():
                continue
            this_match, this_f1 = self._against(spans, gold)
            match, f1 = max(match, this_match), max(f1, this_f1)
            if this_match == match or this_f1 == f1:
                kind = answer_type(gold)
        return match, f1, kind

    @override
    def scores(self, pred: str | Sequence[str], target: Sequence[Sequence[str]]) -> dict[str, float]:
        """Return ``score`` (exact match) and ``score_f1``, both in 0-1."""
        match, f1, _ = self._best(pred, target)
        return {"score": match, "score_f1": f1}

    @override
    def score(self, pred: str | Sequence[str], target: Sequence[Sequence[str]]) -> float:
        """Return 1.0 if ``pred`` matches one of the gold answers exactly, else 0.0."""
        return self._best(pred, target)[0]

    def score_f1(self, pred: str | Sequence[str], target: Sequence[Sequence[str]]) -> float:
        """Return the F1 of ``pred``, in 0-1, with the best of the gold answers."""
        return self._best(pred, target)[1]

    @override
    def update(self, preds: Sequence[str | Sequence[str]], targets: Sequence[Sequence[Sequence[str]]]) -> None:
        """Score a batch of answers."""
        check_pairs(preds, targets)
        added = torch.zeros_like(self.counts, device="cpu")
        for pred, target in zip(preds, targets, strict=True):
            match, f1, kind = self._best(pred, target)
            added[ANSWER_TYPES.index(kind)] += torch.tensor([int(match), round(f1 * _UNIT), 1])
        self.counts += added.to(self.counts.device)

    @override
    def compute(self) -> dict[str, Tensor]:
        """Return the scores over all questions and ranks."""
        if self.counts[:, 2].sum() == 0:
            raise ValueError("`DROPScore` has seen no example; call `update` before `compute`.")
        scores = self._means("", self.counts.sum(0))
        if self.by_type:
            for kind, row in zip(ANSWER_TYPES, self.counts, strict=True):
                if row[2]:
                    scores |= self._means(f"_{kind}", row)
        return scores

    @staticmethod
    def _means(suffix: str, row: Tensor) -> dict[str, Tensor]:
        matches, f1, questions = row.tolist()
        percent = {"exact_match": 100 * matches / questions, "f1": 100 * f1 / (_UNIT * questions)}
        return {
            name + suffix: torch.tensor(value, dtype=torch.float32, device=row.device)
            for name, value in percent.items()
        }
