"""GSM8K's answer rule
===================

The rule of the data set's authors (``openai/grade-school-math``, ``grade_school_math/dataset.py``), which the strict
filter of common evaluation harnesses repeats.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

_ANSWER = re.compile(r"#### (\-?[0-9\.\,]+)")


class GSM8KAccuracy(Metric):
    r"""Share of generated texts whose final answer equals the gold one, by GSM8K's official rule.

    The answer of a text is the **first** match of ``#### (\-?[0-9\.\,]+)``, stripped, with commas removed; two answers
    are compared **as strings**. A text without a match is wrong.

    The rule is kept as published, with what follows from it:

    * ``#### 18`` equals neither ``#### 18.0`` nor ``#### 18.`` (a full stop after the number is part of the match).
    * ``####18``, ``#### $18`` and ``####  18`` (no blank, a currency sign, two blanks) do not match: wrong.
    * ``1,800`` equals ``1800``; ``1,8,0,0`` does as well.
    * Where a text has several marked answers the first one counts; text after it does no harm.
    * A match of punctuation only (``#### ,``) is an answer, the empty string or dots, that no gold answer equals.

    As input to ``update`` the metric takes:

    * ``preds`` (``list[str]``): generated texts (the response alone: a prompt with worked examples would match first).
    * ``targets`` (``list[str]``): gold answers in GSM8K's format, last line ``#### N``.

    As output of ``compute`` it returns the accuracy, a float32 scalar tensor in 0-1. Counts are summed over ranks.

    Raises:
        ValueError: If the lists differ in length, if a target holds no answer, or if ``compute`` has seen no example.

    Example:
        >>> from lightning_pmss.metrics import GSM8KAccuracy
        >>> metric = GSM8KAccuracy()
        >>> metric.update(["3 * 4 = 12\n#### 12", "It is 7."], ["#### 12", "#### 7"])
        >>> metric.compute()
        tensor(0.5000)

    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    correct: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("correct", default=torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", default=torch.tensor(0), dist_reduce_fx="sum")

    @staticmethod
    def extract(text: str) -> str | None:
        """Return the final answer of ``text`` without commas, ``None`` where it holds none."""
        match = _ANSWER.search(text)
        return None if match is None else match.group(1).strip().replace(",", "")

    @classmethod
    def score(cls, pred: str, target: str) -> float:
        """Return 1.0 if the answers of ``pred`` and ``target`` agree, else 0.0."""
        gold = cls.extract(target)
        if gold is None:
            raise ValueError(f"The target {target!r} holds no answer; GSM8K's targets end in a line such as '#### 42'.")
        return float(cls.extract(pred) == gold)

    @override
    def update(self, preds: Sequence[str], targets: Sequence[str]) -> None:
        """Count a batch of generated texts against their gold answers."""
        if isinstance(preds, str) or isinstance(targets, str):
            raise TypeError("`preds` and `targets` are lists of texts; got a single text. Put it into a list.")
        if len(preds) != len(targets):
            raise ValueError(f"Got {len(preds)} texts for {len(targets)} targets; give one text per target.")
        self.correct += int(sum(self.score(pred, target) for pred, target in zip(preds, targets, strict=True)))
        self.total += len(preds)

    @override
    def compute(self) -> Tensor:
        """Return the accuracy over all texts and ranks."""
        if self.total == 0:
            raise ValueError("`GSM8KAccuracy` has seen no example; call `update` before `compute`.")
        return self.correct.float() / self.total
