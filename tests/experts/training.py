"""A LightningModule around a small mixture; ``python -m tests.experts.training FOLDER CHECKPOINT`` trains on two processes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_pmss import AdapterCallback, AdapterConfig, LoRAConfig
from lightning_pmss.conversion.convert import adapted_layers
from tests.experts.toys import mixture
from tests.leaving import leave


class Mixture(L.LightningModule):
    def __init__(self, name: str = "mixtral", lr: float = 0.02, **options: Any) -> None:
        super().__init__()
        self.model = mixture(name, **options)
        self.losses: list[float] = []
        self.lr = lr

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (ids,) = batch
        loss: Tensor = self.model(ids, labels=ids).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)


def batches(count: int = 8, length: int = 9, size: int = 2) -> DataLoader[Any]:
    ids = torch.randint(0, 64, (count * size, length), generator=torch.Generator().manual_seed(7))
    return DataLoader(TensorDataset(ids), batch_size=size)


def fit(folder: Path, module: L.LightningModule, config: AdapterConfig, *more: L.Callback, **options: Any) -> L.Trainer:
    """Train on `batches`; the adapter and the merged model are in ``folder/out``."""
    checkpoint, loader = options.pop("checkpoint", None), options.pop("loader", None) or batches()
    settings: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "max_steps": 8, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "default_root_dir": folder,
    }  # fmt: skip
    callback = AdapterCallback(config, output_dir=folder / "out", merge_on_save=options.pop("merge", None))
    saves = {"enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in more)}
    trainer = L.Trainer(**settings | saves | options, callbacks=[callback, *more])
    trainer.fit(module, loader, ckpt_path=checkpoint)
    return trainer


if __name__ == "__main__":
    folder, checkpoint = Path(sys.argv[1]), sys.argv[2] or None
    module = Mixture("qwen3_moe", num_experts=16)
    saver = ModelCheckpoint(folder / "saved", "{step}", every_n_train_steps=2, save_top_k=-1)  # two epochs
    # One short sequence a rank: some experts get tokens on one rank only.
    trainer = fit(
        folder, module, LoRAConfig(rank=4), saver,
        devices=2, strategy="ddp", max_steps=4, checkpoint=checkpoint, loader=batches(4, 2, 1),
    )  # fmt: skip
    layers = adapted_layers(module)
    record = {
        "losses": module.losses,
        "numbers": {n: [t.double().sum().item() for t in x.core.trained().values()] for n, x in layers.items()},
        "ran": {n: x.ran() for n, x in layers.items()},
    }
    (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(record))
    leave()
