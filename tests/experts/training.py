"""A LightningModule around a small mixture; ``python -m tests.experts.training FOLDER CHECKPOINT`` trains on two processes."""

from __future__ import annotations

import functools
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_pmss import LoRAConfig
from tests import small_runs
from tests.experts.toys import mixture


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


fit = functools.partial(small_runs.fit, batches)


if __name__ == "__main__":
    # One short sequence a rank: some experts get tokens on one rank only.
    small_runs.fit_on_two(Mixture("qwen3_moe", num_experts=16), LoRAConfig(rank=4), batches(4, 2, 1))
