"""A LightningModule of convolutions and an embedding; ``python -m tests.applied.training FOLDER CHECKPOINT``: two processes."""

from __future__ import annotations

import functools
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from tests import small_runs
from tests.applied.toys import config_of, net, targets


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


fit = functools.partial(small_runs.fit, batches, merge="end")


if __name__ == "__main__":
    small_runs.fit_on_two(Module(), config_of("pmss", *targets("pmss")), batches(4))
