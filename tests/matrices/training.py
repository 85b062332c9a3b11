"""A LightningModule around a toy; ``python -m tests.matrices.training FOLDER CHECKPOINT`` trains on two processes."""

from __future__ import annotations

import functools
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_pmss import AdapterConfig, PMSSConfig
from tests import small_runs
from tests.matrices.toys import TOYS, D, made


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


fit = functools.partial(small_runs.fit, batches)


if __name__ == "__main__":
    small_runs.fit_on_two(Training(), config_of("encoder"), batches(4))
