"""GSM8K's answer rule.

It is the rule of the data set's authors (``openai/grade-school-math``, ``grade_school_math/dataset.py``). The strict filter of
common evaluation harnesses repeats it.
"""

from __future__ import annotations

import re
from fractions import Fraction

from lightning_pmss.metrics.base import OnClassToo, TextAccuracy
from lightning_pmss.metrics.exact import exact_number

_ANSWER = re.compile(r"#### (\-?[0-9\.\,]+)")
_MARK = re.compile(r"####[^\S\n]*\n?")


class GSM8KAccuracy(TextAccuracy):
    r"""Share of generated texts whose final answer equals the gold one, by GSM8K's official rule.

    The answer of a text is the **first** match of ``#### (\-?[0-9\.\,]+)``, stripped, with commas removed; two answers
    are compared **as strings**. A text without a match is wrong.

    ``strict=True`` keeps the rule as published (it is the rule of published numbers), with its consequences:

    * ``#### 18`` equals neither ``#### 18.0`` nor ``#### 18.`` (a full stop after the number is part of the match).
    * ``####18``, ``#### $18`` and ``####  18`` (no blank, a currency sign, two blanks) do not match: wrong.
    * ``1,800`` equals ``1800``; ``1,8,0,0`` does as well.
    * If a text has several marked answers, the first one is used; text after it does no harm.
    * A match of punctuation only (``#### ,``) is an answer, the empty string or dots, that no gold answer equals.

    ``strict=False`` corrects the first two: behind the first ``####``, with blanks or a line's end or nothing between,
    the first number of the line is used. It is read in the usual notations (``9{,}500``, ``9 500``, ``9,500 $``,
    ``\boxed{9500}``, a Unicode minus; `lightning_pmss.metrics.exact`) and compared exactly: ``18``, ``18.0``,
    ``18.`` and ``36/2`` are equal, nothing is rounded. A number is read whole or not at all: ``1,8,0,0``, ``9,5`` and
    ``3*4`` are no answer, rather than 1, 9 and 3. Still a text without ``####`` is wrong: where texts end in "The answer
    is", take `MetaMathAccuracy`.

    As input to ``update`` the metric takes:

    * ``preds`` (``list[str]``): generated texts (the response alone: a prompt with worked examples would match first).
    * ``targets`` (``list[str]``): gold answers in GSM8K's format, last line ``#### N``.

    As output of ``compute`` it returns the accuracy, a float32 scalar tensor in 0-1. Counts are summed over ranks.

    Args:
        strict: Score by the rule as published; else by the corrected one. `score` called on the class is strict.

    Raises:
        ValueError: If the lists differ in length, if a target contains no answer, or if ``compute`` has seen no example.

    Example:
        >>> from lightning_pmss.metrics import GSM8KAccuracy
        >>> metric = GSM8KAccuracy()
        >>> metric.update(["3 * 4 = 12\n#### 12", "It is 7."], ["#### 12", "#### 7"])
        >>> metric.compute()
        tensor(0.5000)
    """

    strict = True

    @OnClassToo
    def extract(self, text: str) -> str | Fraction | None:
        """Return the final answer of ``text``, ``None`` if it has none: a text without commas by the published rule, a
        number by the corrected one."""
        if not self.strict:
            return self.extract_number(text)
        match = _ANSWER.search(text)
        return None if match is None else match.group(1).strip().replace(",", "")

    @staticmethod
    def extract_number(text: str) -> Fraction | None:
        """Return the final number of ``text`` by the corrected rule, ``None`` if it has none."""
        mark = _MARK.search(text)
        if mark is None:
            return None
        return exact_number(text[mark.end() :].split("\n", 1)[0])

    @OnClassToo
    def score(self, pred: str, target: str) -> float:
        """Return 1.0 if the answers of ``pred`` and ``target`` agree, else 0.0."""
        gold = self.extract(target)
        if gold is None:
            raise ValueError(f"The target {target!r} holds no answer; GSM8K's targets end in a line such as '#### 42'.")
        return float(self.extract(pred) == gold)
