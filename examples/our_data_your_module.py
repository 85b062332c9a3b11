"""Our DataModule with a LightningModule of your own, here a plain Hugging Face model trained on packed rows.

    python examples/our_data_your_module.py [--model FOLDER] [--steps 20]

``make quickstart`` puts a model into models/SmolLM2-135M-Instruct, the default; any folder of a model with its tokenizer
will do. The problems are generated: no data is needed. Another DataModule of the library goes into the same place.
"""

from __future__ import annotations

import argparse
from typing import Any

import lightning as L
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_pmss.datamodules import ArithmeticDataModule
from lightning_pmss.metrics import GSM8KAccuracy


class YourModule(L.LightningModule):
    """A module that knows the batches only: int64 tensors that a model of transformers takes as they are."""

    def __init__(self, folder: str, lr: float) -> None:
        super().__init__()
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.accuracy = GSM8KAccuracy()
        self.lr = lr

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        # input_ids, labels, and attention_mask or, packed, position_ids: the loss is on the responses alone.
        # With accumulate_grad_batches or several devices derive from TokenWeighted, else Lightning averages batch means.
        loss = self.model(**batch, use_cache=False).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        # Evaluation adds the prompts alone, padded on the left, and what answers are scored against.
        tokens = self.model.generate(
            batch["prompt_ids"], attention_mask=batch["prompt_mask"], max_new_tokens=32, do_sample=False,
            pad_token_id=self.tokenizer.eos_token_id,
        )  # fmt: skip
        new = tokens[:, batch["prompt_ids"].shape[1] :]
        self.accuracy.update(self.tokenizer.batch_decode(new, skip_special_tokens=True), batch["target"])

    def on_test_epoch_end(self) -> None:
        self.log("accuracy", self.accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train, test, and return what was logged."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--cache-dir")
    options = parser.parse_args(arguments)
    L.seed_everything(0, verbose=False)
    data = ArithmeticDataModule(
        options.model, train_size=200, val_size=0, test_size=16, batch_size=2, eval_batch_size=16, max_length=256,
        packing=True, cache_dir=options.cache_dir,
    )  # fmt: skip
    trainer = L.Trainer(max_steps=options.steps, accelerator="cpu", logger=False, enable_checkpointing=False)
    module = YourModule(options.model, options.lr)
    trainer.fit(module, data)
    print(data.packing_report)
    return {name: float(value) for name, value in trainer.test(module, data)[0].items()}


if __name__ == "__main__":
    main()
