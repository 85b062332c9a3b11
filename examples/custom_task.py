"""A task of your own: a DataModule and a metric in thirty lines, here sorting letters.

    python examples/custom_task.py [--model FOLDER] [--steps 20]

The base brings prompt styles, tokenising once into a cache, the loss on responses, splits, packing, worked examples,
batches of similar length that resume exactly, and evaluation that scores each example once.
"""

from __future__ import annotations

import argparse
import random
import tempfile

import lightning as L

from lightning_pmss import PMSSCallback
from lightning_pmss.datamodules import Example, InstructionDataModule
from lightning_pmss.datamodules.instruction import Split
from lightning_pmss.metrics import TextAccuracy
from lightning_pmss.modules import CausalLMModule


class SortingDataModule(InstructionDataModule):
    """Words of random letters, to be put in order; 400 to train on, 24 to test on, validation held out of the 400."""

    def load_examples(self, split: Split) -> list[Example] | None:
        """Return the examples of ``split``; nothing else is needed."""
        if split == "val":
            return None
        rng = random.Random(f"{self.seed}/{split}")
        words = ["".join(rng.sample("abcdefghijkl", 5)) for _ in range(400 if split == "train" else 24)]
        return [Example(f"Sort the letters of {word}.", "".join(sorted(word))) for word in words]


class SortingAccuracy(TextAccuracy):
    """Share of answers that are the sorted word; strict: byte for byte, else whatever the case and what follows."""

    def score(self, pred: str, target: str) -> float:
        """Return 1.0 if ``pred`` is right, else 0.0."""
        if not self.strict:
            pred = pred.strip().lower().partition("\n")[0]
        return float(pred == target)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Fine-tune with PMSS and return the test scores."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--cache-dir")
    options = parser.parse_args(arguments)
    L.seed_everything(0, verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            max_steps=options.steps, accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=folder,
            callbacks=[PMSSCallback(rank=options.rank, output_dir=folder, merge_on_save=None)],
        )  # fmt: skip
        module = CausalLMModule(options.model, metric=SortingAccuracy(strict=False), max_new_tokens=8)
        data = SortingDataModule(options.model, val_size=40, cache_dir=options.cache_dir)
        trainer.fit(module, data)
        return {name: float(value) for name, value in trainer.test(module, data)[0].items()}


if __name__ == "__main__":
    main()
