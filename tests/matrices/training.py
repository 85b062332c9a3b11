"""A LightningModule around a toy; ``python -m tests.matrices.training FOLDER CHECKPOINT`` trains on two processes."""

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

from lightning_pmss import AdapterCallback, AdapterConfig, PMSSConfig
from tests.leaving import leave
from tests.matrices.toys import TOYS, D, made, matrices


class Training(L.LightningModule):
    def __init__(self, name: str = "encoder") -> None:
        super().__init__()
        self.model = made(name, torch.float32)
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x,) = batch
        y = self.model(x)
        loss: Tensor = (y - torch.sin(torch.arange(y.numel(), device=y.device)).view_as(y)).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.02)


def config_of(name: str, kind: type[AdapterConfig] = PMSSConfig, **options: Any) -> AdapterConfig:
    return kind(**{"rank": 3, "target_modules": [], "target_parameters": TOYS[name].patterns} | options)


def batches(count: int = 8) -> DataLoader[Any]:
    return DataLoader(
        TensorDataset(torch.randn(count * 2, 7, D, generator=torch.Generator().manual_seed(7))), batch_size=2
    )


def fit(folder: Path, module: L.LightningModule, config: AdapterConfig, *more: L.Callback, **options: Any) -> L.Trainer:
    """Train on `batches`; the adapter is in ``folder/out``."""
    checkpoint, loader = options.pop("checkpoint", None), options.pop("loader", None) or batches()
    settings: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "max_steps": 8, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "default_root_dir": folder,
    }  # fmt: skip
    callback = AdapterCallback(config, output_dir=folder / "out", merge_on_save=None)
    saves = {"enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in more)}
    trainer = L.Trainer(**settings | saves | options, callbacks=[callback, *more])
    trainer.fit(module, loader, ckpt_path=checkpoint)
    return trainer


if __name__ == "__main__":
    folder, checkpoint = Path(sys.argv[1]), sys.argv[2] or None
    module = Training()
    saver = ModelCheckpoint(folder / "saved", "{step}", every_n_train_steps=2, save_top_k=-1)
    trainer = fit(
        folder,
        module,
        config_of("encoder"),
        saver,
        devices=2,
        strategy="ddp",
        max_steps=4,
        checkpoint=checkpoint,
        loader=batches(4),
    )
    numbers = {n: [t.double().sum().item() for t in x.core.trained().values()] for n, x in matrices(module).items()}
    (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps({"losses": module.losses, "numbers": numbers}))
    leave()
