"""ARC and OpenBookQA in cloze form: the model continues a question with the text of an answer, as in pretraining.

A model of this size learns of the label form ("the correct answer is answer2") nothing but the form. The score is the share
of questions whose right answer is the likeliest of those offered, by its log-probability per byte of text.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from lightning_pmss.datamodules.continuations import continued
from lightning_pmss.datamodules.instruction import Example, InstructionDataModule, Split
from lightning_pmss.evaluation.likelihood import log_likelihoods

_QUESTION = re.compile(
    r"Please choose the correct answer to the question: (.*?)\n\n(Answer1: .*?)\n\nAnswer format", re.DOTALL
)
_OPTION = re.compile(r"Answer(\d): ")
_FILES = {"train": "train.json", "val": None, "test": "test.json"}


def parse(instruction: str, answer: str) -> tuple[str, list[str], int]:
    """Question, the texts of the answers offered, and the number of the right one, of one row in LLM-Adapters' form.

    Raises:
        ValueError: The text is not in that form.
    """
    if (found := _QUESTION.search(instruction)) is None:
        raise ValueError(f"{instruction[:80]!r} is not a question in LLM-Adapters' form.")
    parts = _OPTION.split(found[2])[1:]
    texts = {int(number): text.strip() for number, text in zip(parts[::2], parts[1::2], strict=True)}
    right = int(answer.removeprefix("answer"))
    if right not in texts or sorted(texts) != list(range(1, len(texts) + 1)):
        raise ValueError(
            f"{instruction[:80]!r} offers the answers {sorted(texts)}, and {answer!r} is said to be right."
        )
    return found[1].strip(), [texts[number] for number in sorted(texts)], right - 1


class ClozeDataModule(InstructionDataModule):
    """Questions with their right answer as the response; the target keeps all the answers offered.

    Args:
        tokenizer: Folder of the tokenizer.
        path: LLM-Adapters' folder ``dataset``.
        tasks: Trained on, such as ``["ARC-Easy", "openbookqa"]``; the first one is tested on.
        **kwargs: Arguments of `InstructionDataModule`.
    """

    def __init__(self, tokenizer: str, path: str, tasks: list[str], **kwargs: Any) -> None:
        super().__init__(tokenizer, **kwargs)
        self.path, self.tasks = Path(path), tasks

    @override
    def load_examples(self, split: Split) -> list[Example] | None:
        """Read the rows of a split."""
        file = _FILES[split]
        if file is None:
            return None
        examples = []
        for task in self.tasks if split == "train" else self.tasks[:1]:
            for row in json.loads((self.path / task / file).read_text(encoding="utf-8")):
                question, answers, right = parse(row["instruction"], row["answer"])
                examples.append(Example(question, answers[right], [str(right), *answers]))
        return examples


@torch.no_grad()
def cloze_accuracy(model: Any, tokenizer: Any, batches: Any, device: torch.device) -> list[bool]:
    """Whether each question's right answer is the likeliest of those offered, per byte; in the loader's order."""
    right = []
    for batch in batches:
        offered = [target[1:] for target in batch["target"]]
        most = max(map(len, offered))
        # Questions with fewer answers are filled up with their first one, which is then not looked at.
        texts = [[answers[turn] if turn < len(answers) else answers[0] for answers in offered] for turn in range(most)]
        turns = [continued(tokenizer, batch["prompt"], [f" {text}" for text in turn])[1] for turn in texts]
        prompts = batch["prompt_ids"].to(device), batch["prompt_mask"].to(device)
        found = log_likelihoods(model, *prompts, turns, int(tokenizer.eos_token_id or 0))
        for i, answers in enumerate(offered):
            scores = [float(found[turn, i]) / len(text.encode()) for turn, text in enumerate(answers)]
            right.append(max(range(len(scores)), key=scores.__getitem__) == int(batch["target"][i][0]))
    return right
