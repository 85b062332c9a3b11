"""Small LightningModules and a loader for the callback's tests; ``python toys.py ...`` resumes in a process of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_pmss import PMSSCallback
from lightning_pmss.datamodules.sampler import LengthGroupedSampler, ResumableDataLoader, TrainerProgress

EXAMPLES, BATCH = 22, 4


def make_net() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))


class Toy(L.LightningModule):
    """Built in ``__init__``."""

    def __init__(self) -> None:
        super().__init__()
        self.net: Any = make_net()
        self.losses: list[float] = []
        self.lr = 0.02

    def loss(self, batch: Any) -> Tensor:
        (x,) = batch
        return (self.net(x) - x.flip(-1)).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)


class LateToy(Toy):
    """Built in ``configure_model``."""

    def __init__(self) -> None:
        super().__init__()
        self.net = None

    def configure_model(self) -> None:
        if self.net is None:
            self.net = make_net()


def inputs(count: int = EXAMPLES) -> TensorDataset:
    return TensorDataset(torch.randn(count, 16, generator=torch.Generator().manual_seed(3)))


def plain_loader() -> DataLoader[Any]:
    return DataLoader(inputs(), batch_size=BATCH)


class Numbers(L.LightningDataModule):
    """A shuffled, resumable train loader."""

    def __init__(self, num_workers: int = 0) -> None:
        super().__init__()
        self.num_workers = num_workers

    def train_dataloader(self) -> Any:
        assert self.trainer is not None
        return ResumableDataLoader(
            inputs(),
            sampler=LengthGroupedSampler([1] * EXAMPLES, BATCH, 5, self.trainer.world_size, self.trainer.global_rank),
            progress=TrainerProgress(self.trainer),
            batch_size=BATCH,
            num_workers=self.num_workers,
        )

    def val_dataloader(self) -> Any:
        return plain_loader()


def trainer(folder: Path, callback: PMSSCallback | None, *more: L.Callback, **options: Any) -> L.Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 3,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, L.pytorch.callbacks.ModelCheckpoint) for c in more),
        "default_root_dir": folder,
    }
    callbacks = [*([] if callback is None else [callback]), *more]
    return L.Trainer(**settings | options, callbacks=callbacks)


def fit(folder: Path, checkpoint: str | None, late: bool, options: dict[str, Any]) -> list[float]:
    """A fit with dropout on h; the losses of its steps."""
    torch.manual_seed(1234 if checkpoint else 1)  # a resumed process starts from another random state
    module = LateToy() if late else Toy()
    callback = PMSSCallback(rank=6, dropout=0.3, output_dir=folder / "out", merge_on_save=None)
    saver = L.pytorch.callbacks.ModelCheckpoint(folder / "checkpoints", "{step}", every_n_train_steps=4, save_top_k=-1)
    trainer(folder, callback, saver, **options).fit(module, Numbers(), ckpt_path=checkpoint)
    return module.losses


if __name__ == "__main__":
    losses = fit(Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "late", json.loads(sys.argv[4]))
    (Path(sys.argv[1]) / "losses.json").write_text(json.dumps(losses))
