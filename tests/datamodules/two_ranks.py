"""Fits, resumes and validates on two processes; ``python two_ranks.py TOKENIZER FOLDER``; rank r writes r.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_pmss.datamodules import ArithmeticDataModule
from lightning_pmss.metrics import GSM8KAccuracy
from tests.leaving import leave


class Seen(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.metric = GSM8KAccuracy()
        self.batches: list[list[list[int]]] = []
        self.evaluated: list[int] = []
        self.accuracy = -1.0

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        self.batches.append(batch["input_ids"].tolist())
        return self.layer(batch["labels"].float().mean().view(1, 1)).sum()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.evaluated += batch["id"].tolist()
        # Row 0 alone is answered right.
        rows = zip(batch["id"].tolist(), batch["target"], strict=True)
        scored = [(target if row == 0 else "?", target) for row, target in rows if row >= 0]
        self.metric.update([pred for pred, _ in scored], [target for _, target in scored])

    def on_validation_epoch_end(self) -> None:
        self.accuracy = float(self.metric.compute())
        self.metric.reset()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-6)


def main(tokenizer: str, folder: Path) -> None:
    torch.set_num_threads(1)
    options: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 2,
        "strategy": "ddp",
        "logger": False,
        "max_epochs": 2,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": folder,
    }

    def data(**more: int) -> ArithmeticDataModule:
        # 21 and 9 rows do not divide by two ranks; 9 rows in batches of 4 give 2 batches on one rank, 1 on the other
        sizes = {"train_size": 21, "val_size": 9, "test_size": 4, "batch_size": 4} | more
        return ArithmeticDataModule(tokenizer, cache_dir=str(folder / "cache"), **sizes)

    keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    whole = Seen()
    trainer = L.Trainer(callbacks=[keep], **options)
    trainer.fit(whole, data())
    rest = Seen()
    L.Trainer(enable_checkpointing=False, **options).fit(rest, data(), ckpt_path=str(folder / "step=4.ckpt"))
    one = Seen()
    L.Trainer(enable_checkpointing=False, **options).validate(one, data(val_size=1))
    record = {
        "one": one.evaluated,
        "accuracy_of_one": one.accuracy,
        "batches": whole.batches,
        "rest": rest.batches,
        "evaluated": whole.evaluated,
        "accuracy": whole.accuracy,
        "sampler": type(trainer.train_dataloader.sampler).__name__,
    }
    (folder / f"{trainer.global_rank}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    leave()
