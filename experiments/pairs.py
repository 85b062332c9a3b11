"""Random key-value pairs to memorise: how much can the trained parameters hold?"""

from __future__ import annotations

import random
import string
from typing import Any

from typing_extensions import override

from experiments.second_blank import second_blank
from lightning_pmss.datamodules.instruction import Example, InstructionDataModule, Split, check_int


class PairsDataModule(InstructionDataModule):
    """``size`` pairs of random words: prompt ``<key> ->``, response the value. All splits are the same pairs.

    Nothing about a value can be known before training, so the loss on the values is a measure of capacity. The task is that
    of MoRA (arXiv 2405.12130), section 3, which memorises pairs of UUIDs; the words here are short, as the models are small.

    Args:
        tokenizer: Folder of the tokenizer.
        size: Number of pairs.
        letters: Letters of a key and of a value; no two keys are equal.
        pairs_seed: Seed of the words. ``seed`` is that of their order in training.
        val_size: 0 turns validation off; otherwise all pairs are the validation set.
        **kwargs: Arguments of `InstructionDataModule`.
    """

    plain_template = "{question} ->"

    def __init__(
        self, tokenizer: str, size: int = 256, letters: int = 6, pairs_seed: int = 0, val_size: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(tokenizer, val_size=val_size, **kwargs)  # the command line reads this call
        for name, value, least in (("size", size, 1), ("letters", letters, 1), ("pairs_seed", pairs_seed, 0)):
            check_int(type(self).__name__, name, value, least)
        if size > 26**letters:
            raise ValueError(f"`size={size}` different keys need more than {letters} letters; give a larger `letters`.")
        self.size, self.letters, self.pairs_seed = size, letters, pairs_seed

    @override
    def load_examples(self, split: Split) -> list[Example]:
        """The pairs, for every split."""
        rng = random.Random(self.pairs_seed)

        def word() -> str:
            return "".join(rng.choices(string.ascii_lowercase, k=self.letters))

        pairs: dict[str, str] = {}
        while len(pairs) < self.size:
            pairs.setdefault(word(), word())
        blank = second_blank(self.encoder.tokenizer)
        return [Example(key, blank + value, value) for key, value in pairs.items()]
