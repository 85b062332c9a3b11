"""Direct preference optimisation (Rafailov et al. 2023): the reference is the same model with its adapter switched off.

    python examples/dpo.py --data PREFERENCES.jsonl [--model FOLDER] [--output FOLDER]

Rows have `prompt`, `chosen` and `rejected`; without --data a few rows are made up. There is no second copy of the weights.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from lightning_pmss import PMSSCallback
from lightning_pmss.datamodules import ChatDataModule
from lightning_pmss.named import disable_adapter


class DPO(L.LightningModule):
    """Raises the likelihood of chosen answers over that of rejected ones, relative to the base.

    Args:
        folder: Folder of the base model.
        beta: How strongly the model is held to the base; the smaller, the further it may move.
        lr: Learning rate.
    """

    def __init__(self, folder: str, beta: float = 0.1, lr: float = 1e-3) -> None:
        super().__init__()
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.beta, self.lr = beta, lr

    def log_likelihood(self, batch: dict[str, Tensor]) -> Tensor:
        """Sum of the log-probabilities of the trained tokens (labels other than -100) of each row, float32 [B]."""
        mask = batch.get("attention_mask")
        logits = self.model(input_ids=batch["input_ids"], attention_mask=mask, use_cache=False).logits
        labels = batch["labels"][:, 1:]
        losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), labels, ignore_index=-100, reduction="none")
        return -losses.sum(1)

    def margins(self, batch: dict[str, dict[str, Tensor]]) -> Tensor:
        """How much more the model prefers each chosen answer than the base does, float32 [B]."""
        with torch.no_grad(), disable_adapter(self.model):
            reference = self.log_likelihood(batch["chosen"]) - self.log_likelihood(batch["rejected"])
        return self.log_likelihood(batch["chosen"]) - self.log_likelihood(batch["rejected"]) - reference

    def training_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> Tensor:
        margins = self.margins(batch)
        self.log("margin", margins.detach().mean(), prog_bar=True, batch_size=len(margins))
        self.log("preferred", (margins.detach() > 0).float().mean(), prog_bar=True, batch_size=len(margins))
        return -F.logsigmoid(self.beta * margins).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr, weight_decay=0.0)


def toy_rows() -> list[dict[str, str]]:
    """Short answers are chosen, long-winded ones rejected."""
    things = ("pens", "eggs", "boxes", "miles", "hours", "trains", "questions", "answers")
    return [
        {"prompt": f"How many {t}?", "chosen": f"12 {t}.", "rejected": f"Well, the {t}, that is hard to say."}
        for t in things
    ]


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train, and return the margin of the first batch and the mean over the last quarter of the steps."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--data", help="rows with prompt, chosen and rejected (.jsonl)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--output", default="runs/dpo")
    options = parser.parse_args(arguments)
    L.seed_everything(0, verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(options.data or Path(folder) / "toy.jsonl")
        if options.data is None:
            rows.write_text("".join(f"{json.dumps(row)}\n" for row in toy_rows()))
        data = ChatDataModule(options.model, str(rows), batch_size=4, val_size=0, cache_dir=folder)
        callback = PMSSCallback(rank=options.rank, output_dir=options.output, merge_on_save=None)
        module, seen = DPO(options.model, options.beta, options.lr), Margins()
        trainer = L.Trainer(
            max_steps=options.steps,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            callbacks=[callback, seen],
        )
        trainer.fit(module, data)
    last = seen.values[-max(1, len(seen.values) // 4) :]
    margins = {"first": seen.values[0], "last": sum(last) / len(last)}
    print("margin {first:.3f} -> {last:.3f}; ".format(**margins) + f"the adapter is in {options.output}/adapter")
    return margins


class Margins(L.Callback):
    """Collects the margin of each step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.values.append(float(trainer.callback_metrics["margin"]))


if __name__ == "__main__":
    main()
