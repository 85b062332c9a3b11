"""MetaMath's answer rule for GSM8K.

It is the rule of "MetaMath: Bootstrap Your Own Mathematical Questions for Large Language Models" (Yu et al. 2023,
``meta-math/MetaMath``, ``eval_gsm8k.py``). PiSSA and others evaluate with it.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction

from typing_extensions import override

from lightning_pmss.metrics.base import OnClassToo, TextAccuracy
from lightning_pmss.metrics.exact import exact_number, only_number

MARK = "The answer is: "

_STRICT = re.compile(r"[\-+]?\d*[\.,/]?\d+")
_MARKS = re.compile(r"the (?:final )?answer is:?|####", re.IGNORECASE)
_GOLD = re.compile(r"#### ?(\S.*)")
# Gold answers for the published rule, as this library always read them: the first number, thousands with commas.
_FIRST = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+|(?<=\d))(?:\s*/\s*\d+(?:\.\d+)?)?")
_PUBLISHED_GOLD = re.compile(r"#### ?([-+]?[\d,]*\.?\d+)")


def _strict_number(text: str) -> int | None:
    parts = text.split(MARK)
    if len(parts) < 2:
        return None
    match = _STRICT.search(parts[-1].strip())
    if match is None:
        return None
    number = match.group().replace(",", "")
    try:
        if "/" not in number:
            return round(float(number))
        top, bottom = number.split("/")
        if not top:
            return None
        # A float quotient before rounding, as published; "0" alone is the denominator that is passed over.
        return round(float(top)) if bottom == "0" else round(float(Fraction(int(top), int(bottom))))
    except (ValueError, ZeroDivisionError, OverflowError):  # "+/3", "1/00", more digits than a float holds
        return None


def _corrected_number(text: str) -> Fraction | None:
    marks = list(_MARKS.finditer(text))
    if not marks:
        return None
    return exact_number(text[marks[-1].end() :].strip().split("\n", 1)[0])


def _exact_gold(target: str) -> Fraction | None:
    match = _GOLD.search(target)
    if match is not None:
        return exact_number(match[1])
    return _corrected_number(target) if MARK in target else only_number(target)


def _published_gold(target: str) -> Fraction | None:
    match = _PUBLISHED_GOLD.search(target)
    if match is not None:
        text = match[1]
    elif MARK in target:
        text = target[list(_MARKS.finditer(target))[-1].end() :].strip().split("\n", 1)[0]
    else:
        text = target if re.fullmatch(r"\s*\$?[-+]?[\d,./]+\s*", target) else ""
    found = _FIRST.search(text.replace("$", "").replace("\\", ""))
    if found is None:
        return None
    top, _, bottom = found.group().replace(",", "").partition("/")
    try:
        return Fraction(top.strip()) / Fraction(bottom.strip()) if bottom else Fraction(top.strip())
    except (ArithmeticError, ValueError):
        return None


class MetaMathAccuracy(TextAccuracy):
    r"""Share of generated texts whose final number equals GSM8K's gold one, by MetaMath's rule.

    The number of a text is the first match of ``[\-+]?\d*[\.,/]?\d+`` behind the **last** ``The answer is: ``, without
    commas. It is **rounded** (to the nearest whole number, halves to the even one) and compared as a number. A text
    without the mark, or without a number behind it, is wrong.

    ``strict=True`` keeps the known faults of that rule (it is the rule of published numbers):

    * Rounding: 17.6 and 18.4 are right where 18 is.
    * The expression takes one separator: ``1,234,567`` is read as 1234, ``3.50/2`` as 3.5, and so 4.
    * The mark must be byte for byte so: ``the answer is 18``, ``The answer is:18`` are wrong.
    * Where the published script would stop with an error (``1/00``), the text is wrong here.

    ``strict=False`` corrects these: numbers are exact (fractions and decimals, nothing is rounded), they are read in the
    usual notations, whole or not at all (`lightning_pmss.metrics.exact`), the mark may be ``The answer is``, ``The
    final answer is`` or ``####`` in any case, with or without the colon and the blank.

    As input to ``update`` the metric takes:

    * ``preds`` (``list[str]``): generated texts, the response alone.
    * ``targets`` (``list[str]``): gold answers: in GSM8K's format (``#### N``), or a text with ``The answer is: N`` as
      in MetaMathQA, or the number alone.

    As output of ``compute`` it returns the accuracy, a float32 scalar tensor in 0-1. Counts are summed over ranks.

    Args:
        strict: Score by MetaMath's rule as published; else by the corrected one.

    Raises:
        ValueError: If the lists differ in length, a target contains no number, or ``compute`` has seen no example.

    Example:
        >>> from lightning_pmss.metrics import MetaMathAccuracy
        >>> metric = MetaMathAccuracy()
        >>> metric.update(["So 3 * 6 = 18.\nThe answer is: 18", "The answer is: 17.6"], ["#### 18", "#### 18"])
        >>> metric.compute()
        tensor(1.)
    """

    strict = False

    def extract(self, text: str) -> int | Fraction | None:
        """Return the final number of ``text``, ``None`` if it has none."""
        return _strict_number(text) if self.strict else _corrected_number(text)

    @OnClassToo
    def gold(self, target: str) -> Fraction:
        """Return the number of a target, exactly; called on the class, as the corrected rule reads it.

        Raises:
            ValueError: If it contains none.
        """
        number = _published_gold(target) if self.strict else _exact_gold(target)
        if number is None:
            raise ValueError(
                f"The target {target[-60:]!r} holds no answer; it must end in a line such as '#### 42' or"
                " 'The answer is: 42', or be a number."
            )
        return number

    @override
    def score(self, pred: str, target: str) -> float:
        """Return 1.0 if the number of ``pred`` is that of ``target``, else 0.0."""
        gold = self.gold(target)
        answer = self.extract(pred)
        if answer is None:
            return 0.0
        # The published script reads gold answers as int: GSM8K has no others. Others are rounded as the answers are.
        return float(answer == (_half_even(gold) if self.strict else gold))


def _half_even(number: Fraction) -> int:
    value = float(number)
    return round(value) if math.isfinite(value) else round(number)
