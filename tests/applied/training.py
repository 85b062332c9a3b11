"""A LightningModule of convolutions and an embedding; ``python -m tests.applied.training FOLDER CHECKPOINT``: two processes."""

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

from lightning_pmss import AdapterCallback, AdapterConfig
from lightning_pmss.conversion.convert import adapted_layers
from tests.applied.toys import config_of, net, targets
from tests.leaving import leave


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (ids,) = batch
        loss: Tensor = (self.net(ids) - 1).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


def batches(count: int = 8) -> DataLoader[Any]:
    ids = torch.randint(0, 23, (count * 2, 9), generator=torch.Generator().manual_seed(7))
    return DataLoader(TensorDataset(ids), batch_size=2)


def fit(folder: Path, module: L.LightningModule, config: AdapterConfig, *more: L.Callback, **options: Any) -> L.Trainer:
    """Train on `batches`; the adapter and the merged model are in ``folder/out``."""
    checkpoint, loader = options.pop("checkpoint", None), options.pop("loader", None) or batches()
    settings: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "max_steps": 8, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "default_root_dir": folder,
    }  # fmt: skip
    callback = AdapterCallback(config, output_dir=folder / "out")
    saves = {"enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in more)}
    trainer = L.Trainer(**settings | saves | options, callbacks=[callback, *more])
    trainer.fit(module, loader, ckpt_path=checkpoint)
    return trainer


if __name__ == "__main__":
    folder, checkpoint = Path(sys.argv[1]), sys.argv[2] or None
    module = Module()
    saver = ModelCheckpoint(folder / "saved", "{step}", every_n_train_steps=2, save_top_k=-1)
    trainer = fit(
        folder, module, config_of("pmss", *targets("pmss")), saver,
        devices=2, strategy="ddp", max_steps=4, checkpoint=checkpoint, loader=batches(4),
    )  # fmt: skip
    record = {
        "losses": module.losses,
        "numbers": {
            n: [t.double().sum().item() for t in x.core.trained().values()] for n, x in adapted_layers(module).items()
        },
    }
    (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(record))
    leave()
