r"""MATH's answer rule, as in MetaMath's ``eval_math.py`` (Yu et al. 2023).

It compares the final answer of a text with the gold ``\boxed{}`` by the equivalence of the data set's authors
(`lightning_pmss.metrics.math_equivalence`).
"""

from __future__ import annotations

from typing_extensions import override

from lightning_pmss.metrics.base import TextAccuracy
from lightning_pmss.metrics.math_equivalence import equivalent, equivalent_corrected, last_boxed
from lightning_pmss.metrics.metamath import MARK


class MATHAccuracy(TextAccuracy):
    r"""Share of generated texts whose final answer is equivalent to MATH's gold one.

    The answer of a text is the part behind the **last** ``The answer is: ``, up to a full stop that ends a line, without
    a full stop at its end. The gold answer is the content of the last ``\boxed{}``. Both are brought into one form
    (fractions, roots, degrees, units behind the number, blanks, ``x=`` in front) and compared as strings.

    ``strict=True`` keeps the known faults of that rule (it is the rule of published numbers):

    * A text that ends in ``\boxed{...}``, as the data's own solutions do, without the mark is wrong.
    * Numbers are strings: ``0.25`` is not ``\frac{1}{4}`` (only ``0.5`` is known), ``1,000`` not ``1000``,
      ``\frac{2}{4}`` not ``\frac{1}{2}``, ``2.0`` not ``2``.
    * ``\text{cm}`` without a blank is no unit, and a text with two units is compared as it is.
    * Gold answers written ``\boxed 5`` or ``\fbox{5}`` are not read: whatever is answered is wrong.
    * A full stop is only recognised at a line's end: ``The answer is: 5. Thus`` is wrong.

    ``strict=False`` corrects these: the last ``\boxed{}`` is an answer too (the mark goes first), numbers are read in the
    usual notations (`lightning_pmss.metrics.exact`) and compared exactly, currency signs, ``\text`` around words and
    units in ``\text{}`` behind a number are passed over.

    As input to ``update`` the metric takes:

    * ``preds`` (``list[str]``): generated texts, the response alone.
    * ``targets`` (``list[str]``): solutions with ``\boxed{...}``, or texts with ``The answer is: `` as in MetaMathQA, or
      the bare answer.

    As output of ``compute`` it returns the accuracy, a float32 scalar tensor in 0-1. Counts are summed over ranks.

    Args:
        strict: Score by the rule as published; else by the corrected one.

    Raises:
        ValueError: If the lists differ in length, a target is blank or its box never closes, or ``compute`` has seen no
            example.

    Example:
        >>> from lightning_pmss.metrics import MATHAccuracy
        >>> metric = MATHAccuracy()
        >>> metric.update(["Hence one half. The answer is: 1/2.", "0.25"], [r"so $\boxed{\frac{1}{2}}$", r"\boxed{0.25}"])
        >>> metric.compute()
        tensor(0.5000)
    """

    def extract(self, text: str) -> str | None:
        """Return the final answer of ``text``, ``None`` if it has none."""
        _, found, answer = text.rpartition(MARK)
        if found:
            answer = answer.split(".\n")[0].strip().removesuffix(".").strip()
            if self.strict:
                return answer
            answer = answer.split("\n")[0].split(". ")[0]
            boxed = last_boxed(answer)
            return answer if boxed is None else boxed
        return None if self.strict else last_boxed(text)

    @staticmethod
    def gold(target: str) -> str:
        """Return the answer of a target.

        Raises:
            ValueError: If it contains none.
        """
        answer: str | None
        if "\\boxed" in target or "\\fbox" in target:
            answer = last_boxed(target)
        elif MARK in target:
            answer = target.rpartition(MARK)[2].split(".\n")[0].strip().removesuffix(".")
        else:
            answer = target
        if answer is None or not answer.strip():
            raise ValueError(
                f"The target {target[-60:]!r} holds no answer; give a solution with \\boxed{{...}}, a text with"
                " 'The answer is: ...', or the answer alone."
            )
        return answer.strip()

    @override
    def score(self, pred: str, target: str) -> float:
        """Return 1.0 if the answers of ``pred`` and ``target`` are equivalent, else 0.0."""
        gold, answer = self.gold(target), self.extract(pred)
        boxed = "\\boxed" in target or "\\fbox" in target
        if answer is None or (self.strict and boxed and last_boxed(target, strict=True) is None):
            return 0.0
        return float(equivalent(answer, gold) if self.strict else equivalent_corrected(answer, gold))
