"""A tiny fit that records which examples each step saw; run as a script, it resumes in a process of its own.

``python resume_script.py CHECKPOINT OUTPUT KEY=VALUE ...`` resumes from CHECKPOINT and writes the record to OUTPUT as JSON.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_pmss.datamodules.sampler import LengthGroupedSampler, ResumableDataLoader, TrainerProgress

EXAMPLES = 23
BATCH = 4  # 6 batches an epoch, the last one of 3 examples


class Recorder(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: list[tuple[int, int, list[int]]] = []

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        (ids,) = batch
        self.seen.append((self.trainer.current_epoch, batch_idx, ids.tolist()))
        return self.layer(ids.float().unsqueeze(1) / EXAMPLES).square().mean()

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Numbers(L.LightningDataModule):
    def __init__(self, num_workers: int = 0, batch_size: int = BATCH, persistent: bool = False) -> None:
        super().__init__()
        self.num_workers, self.batch_size, self.persistent = num_workers, batch_size, persistent

    def train_dataloader(self) -> ResumableDataLoader[Any]:
        lengths = [(7 * i) % 11 + 1 for i in range(EXAMPLES)]
        return ResumableDataLoader(
            TensorDataset(torch.arange(EXAMPLES)),
            sampler=LengthGroupedSampler(lengths, self.batch_size, seed=5),
            progress=TrainerProgress(self.trainer),
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.persistent,
        )

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.arange(2)))


def fit(
    folder: Path,
    checkpoint: str | None = None,
    *,
    num_workers: int = 0,
    persistent: bool = False,
    batch_size: int = BATCH,
    **trainer_kwargs: Any,
) -> tuple[list[tuple[int, int, list[int]]], L.Trainer]:
    """Fit 3 epochs (or go on to their end) and return what each step saw."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    module = Recorder()
    options: dict[str, Any] = {"max_epochs": 3, **trainer_kwargs}
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )
    trainer.fit(module, Numbers(num_workers, batch_size, persistent), ckpt_path=checkpoint, weights_only=False)
    return module.seen, trainer


def keep_all(folder: Path, **when: Any) -> ModelCheckpoint:
    """A callback that keeps every checkpoint."""
    return ModelCheckpoint(folder, filename="{epoch}-{step}", save_top_k=-1, **when)


if __name__ == "__main__":
    torch.set_num_threads(1)
    arguments: dict[str, Any] = {key: json.loads(value) for key, value in (item.split("=") for item in sys.argv[3:])}
    record, _ = fit(Path(sys.argv[2]).parent, sys.argv[1], **arguments)
    Path(sys.argv[2]).write_text(json.dumps(record))
