"""DROP's passages as plain text: what a model loses of ordinary prose while it is trained on something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from typing_extensions import override

from experiments.second_blank import second_blank
from lightning_pmss.datamodules.instruction import Example, InstructionDataModule, Split


class PassagesDataModule(InstructionDataModule):
    """The different passages of a DROP file in simple-evals' form, for testing only: the loss is over the whole passage.

    Args:
        tokenizer: Folder of the tokenizer.
        path: JSON lines with a column ``context``.
        characters: Passages are cut to so many.
        **kwargs: Arguments of `InstructionDataModule`.
    """

    plain_template = "{question}:"

    def __init__(self, tokenizer: str, path: str, characters: int = 800, **kwargs: Any) -> None:
        super().__init__(tokenizer, **kwargs)
        self.path, self.characters = Path(path), characters

    @override
    def load_examples(self, split: Split) -> list[Example] | None:
        """The passages as responses to the prompt ``Passage:``."""
        if split != "test":
            return None
        lines = self.path.read_text(encoding="utf-8").splitlines()
        texts = [json.loads(line)["context"].removeprefix("Passage: ").split("\nQuestion:")[0] for line in lines]
        blank = second_blank(self.encoder.tokenizer)
        return [Example("Passage", blank + text[: self.characters]) for text in dict.fromkeys(texts)]
