"""LLM-Adapters' answer rule for the eight commonsense tasks.

It is the rule of "LLM-Adapters: An Adapter Family for Parameter-Efficient Fine-Tuning of Large Language Models" (Hu et al.
2023, ``AGI-Edgerunners/LLM-Adapters``, ``commonsense_evaluate.py``). DoRA and many others evaluate with it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from lightning_pmss.metrics.base import Choice, TextMetric, check_pairs

TASK_LABELS: dict[str, tuple[str, ...]] = {
    "boolq": ("true", "false"),
    "piqa": ("solution1", "solution2"),
    "social_i_qa": ("answer1", "answer2", "answer3", "answer4", "answer5"),
    "hellaswag": ("ending1", "ending2", "ending3", "ending4"),
    "winogrande": ("option1", "option2"),
    "ARC-Easy": ("answer1", "answer2", "answer3", "answer4", "answer5"),
    "ARC-Challenge": ("answer1", "answer2", "answer3", "answer4", "answer5"),
    "openbookqa": ("answer1", "answer2", "answer3", "answer4", "answer5"),
}
"""The eight tasks by LLM-Adapters' names, in the literature's order, with the labels that its expressions look for."""

TASKS = tuple(TASK_LABELS)
_UNNAMED = "other"
_FAMILIES = tuple(dict.fromkeys(TASK_LABELS.values()))
_STATED = re.compile(r"correct (?:answer|solution|ending|option) is:?\s*", re.IGNORECASE)

Target = str | Sequence[str]


def labels_of(label: str) -> tuple[str, ...] | None:
    """Return the family of labels that contains ``label``, ``None`` for an unknown one."""
    return next((family for family in _FAMILIES if label in family), None)


class CommonsenseAccuracy(Metric, TextMetric):
    """Share of generated texts that name the right label, by LLM-Adapters' rule.

    The answer of a text is the **first** label of the task that occurs in it (``true|false``, ``solution1|solution2``,
    ``answer1|...|answer5``, ``ending1|...|ending4``, ``option1|option2``), case and all; it must equal the gold label.

    ``strict=True`` keeps the known faults of that rule (it is the rule of published numbers):

    * Labels match inside of words: ``untrue`` is an answer "true", ``falsehood`` is "false", ``answer12`` is "answer1".
    * The first label is used, so ``not answer1 but answer2`` is "answer1", and so is a repeated list of the options in
      front of the answer.
    * ``True`` and ``Answer 3`` are no labels.
    * Text behind another ``### Response:`` is ignored.

    ``strict=False`` corrects these: labels are whole words in any case, with or without a blank before their number; the
    label that follows ``the correct answer is`` is used (the last such statement), else the only label in the text;
    if a text names several different labels and states none, it is wrong.

    As input to ``update`` the metric takes:

    * ``preds`` (``list[str]``): generated texts, the response alone (the question lists the labels).
    * ``targets``: gold answers: a label (``"answer3"``), a text that states it (``"the correct answer is answer3"``), or
      a pair of task and label, ``("ARC-Easy", "answer3")``.

    As output of ``compute`` it returns the accuracy, a float32 scalar tensor in 0-1; with ``by_task`` a dictionary of
    ``accuracy`` (over all examples), ``average`` (the mean of the tasks' accuracies: the literature's average, where
    all eight are there) and one entry per task that occurred. Counts are summed over ranks.

    Args:
        strict: Score by the rule as published; else by the corrected one.
        by_task: Return the accuracy of each task as well; targets are then pairs (others have the task "other").

    Raises:
        ValueError: If the lists differ in length, a target has no label or an unknown task, or ``compute`` has seen no
            example.

    Example:
        >>> from lightning_pmss.metrics import CommonsenseAccuracy
        >>> metric = CommonsenseAccuracy()
        >>> metric.update(["the correct answer is answer3", "untrue"], ["answer3", "the correct answer is true"])
        >>> metric.compute()
        tensor(1.)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    counts: Tensor

    def __init__(self, strict: bool = True, by_task: bool = False) -> None:
        super().__init__()
        self.strict = strict
        self.by_task = by_task
        # Per task, and last for targets that name none: right ones, all.
        self.add_state("counts", default=torch.zeros(len(TASKS) + 1, 2, dtype=torch.int64), dist_reduce_fx="sum")

    def extract(self, text: str, labels: Sequence[str]) -> str | None:
        """Return which of ``labels`` is the answer of ``text``, ``None`` if there is none."""
        if self.strict:
            # The script splits prompt and text at this mark and takes the second part: one more ends the text.
            match = re.search("|".join(map(re.escape, labels)), text.split("### Response:")[0])
            return match.group() if match else None
        forms = "|".join(re.sub(r"(\d)$", r" ?\1", label) for label in labels)
        found = re.compile(rf"\b(?:{forms})\b", re.IGNORECASE)
        stated = [match for mark in _STATED.finditer(text) if (match := found.match(text, mark.end()))]
        matches = stated[-1:] or list(found.finditer(text))
        named = {match.group().lower().replace(" ", "") for match in matches}
        return named.pop() if len(named) == 1 else None

    @staticmethod
    def gold(target: Target) -> tuple[str, str, tuple[str, ...]]:
        """Return the task ("other" where none is named), the label and all labels of a target.

        Raises:
            ValueError: If it has no label, or names an unknown task.
        """
        task, text = (_UNNAMED, target) if isinstance(target, str) else tuple(target)
        if task != _UNNAMED and task not in TASK_LABELS:
            raise ValueError(f"The target {target!r} names an unknown task; the tasks are {', '.join(TASKS)}.")
        label = text.strip().rstrip(".").split(" ")[-1]
        labels = TASK_LABELS.get(task) or labels_of(label)
        if labels is None or label not in labels:
            known = labels or tuple(label for family in _FAMILIES for label in family)
            raise ValueError(f"The target {target!r} holds no label; it must be or end in one of {', '.join(known)}.")
        return task, label, labels

    @override
    def choice(self, target: Target) -> Choice:
        """Return the task and labels of a target."""
        return Choice(*self.gold(target))

    @override
    def answers(self, pred: str, target: Target) -> tuple[str | None, str]:
        """Return the label that ``pred`` names, and the right one."""
        _, label, labels = self.gold(target)
        return self.extract(pred, labels), label

    @override
    def score(self, pred: str, target: Target) -> float:
        """Return 1.0 if ``pred`` names the label of ``target``, else 0.0."""
        _, label, labels = self.gold(target)
        return float(self.extract(pred, labels) == label)

    @override
    def update(self, preds: Sequence[str], targets: Sequence[Target]) -> None:
        """Count a batch of generated texts against their gold labels."""
        check_pairs(preds, targets)
        added = torch.zeros_like(self.counts, device="cpu")
        for pred, target in zip(preds, targets, strict=True):
            task = self.gold(target)[0]
            row = TASKS.index(task) if task in TASK_LABELS else len(TASKS)
            added[row] += torch.tensor([int(self.score(pred, target)), 1])
        self.counts += added.to(self.counts.device)

    @override
    def compute(self) -> Tensor | dict[str, Tensor]:
        """Return the accuracy over all texts and ranks, per task where asked."""
        right, total = self.counts.sum(0)
        if total == 0:
            raise ValueError("`CommonsenseAccuracy` has seen no example; call `update` before `compute`.")
        accuracy = right.float() / total
        if not self.by_task:
            return accuracy
        rows = zip((*TASKS, _UNNAMED), self.counts, strict=True)
        per_task = {task: row[0].float() / row[1] for task, row in rows if row[1]}
        return {"accuracy": accuracy, "average": torch.stack(list(per_task.values())).mean(), **per_task}
