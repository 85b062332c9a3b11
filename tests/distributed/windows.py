"""Accumulation windows of uneven batches on two processes: ``python -m tests.distributed.windows JSON`` (a list of tasks)."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import lightning as L
import torch

from lightning_pmss import PMSSCallback
from lightning_pmss.callbacks import FlatLoRA
from lightning_pmss.callbacks.loss_curve import LossCurve
from lightning_pmss.datamodules.collate import InstructionCollator
from lightning_pmss.datamodules.sampler import ResumableDataLoader, TrainerProgress
from lightning_pmss.modules import CausalLMModule
from lightning_pmss.optimizers import BSAM, SAM
from tests.distributed.strategies import make_strategy
from tests.leaving import leave

LENGTHS = ((2, 0), (40, 0), (1, 9), (0, 3), (30, 2))
"""Response tokens of the batches of rank 0 and rank 1; in windows of two: one without any on rank 1, and a short one."""
COLLATE = InstructionCollator(pad_id=0)


def row(length: int) -> dict[str, Any]:
    tokens = torch.randint(2, 300, (46,), generator=torch.Generator().manual_seed(length)).tolist()
    return {"prompt_ids": tokens[:5], "response_ids": tokens[5 : 5 + length]}


def parts(rank: int) -> list[dict[str, Any]]:
    """The batches of a rank, of two rows each."""
    return [COLLATE([row(pair[rank]), row(pair[rank] // 2)]) for pair in LENGTHS]


def wholes() -> list[dict[str, Any]]:
    """What both ranks get in each window, as one batch."""
    pairs = [LENGTHS[:2], LENGTHS[2:4], LENGTHS[4:]]
    return [COLLATE([row(n) for pair in window for length in pair for n in (length, length // 2)]) for window in pairs]


class Batches(L.LightningDataModule):
    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.whole = whole

    def train_dataloader(self) -> Any:
        assert self.trainer is not None
        batches = wholes() if self.whole else parts(self.trainer.global_rank)
        progress = TrainerProgress(self.trainer)
        return ResumableDataLoader(batches, progress=progress, collate_fn=lambda given: given[0])  # type: ignore[arg-type]


class Saving(L.Callback):
    """Checkpoints after the first window, and inside the second one."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder, self.names = folder, names

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        name = {1: "after.ckpt", 2: "inside.ckpt"}.get(trainer.fit_loop.total_batch_idx)
        if name in self.names and trainer.accumulate_grad_batches > 1:
            trainer.save_checkpoint(self.folder / name)


def momentum(parameters: Any, lr: float = 0.5) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=lr, momentum=0.5)


slow = functools.partial(momentum, lr=0.1)  # several passes are less stable, and rounding would grow
OPTIMIZERS: dict[str, Any] = {
    "sgd": momentum,
    "sam": lambda p: SAM(p, slow, rho=0.2),
    "bsam": lambda p: BSAM(p, slow, rho_max=0.2, rho_min=0.1),
    "published": lambda p: BSAM(p, slow, rho_max=0.2, rho_min=0.1, published=True),
}


def run(task: dict[str, Any], strategy: Any = "auto", devices: int = 1) -> L.Trainer:
    folder = Path(task["folder"])
    torch.manual_seed(0)
    module = CausalLMModule(
        task["model"],
        optimizer=OPTIMIZERS[task.get("optimizer", "sgd")],
        lr_schedule="constant",
        warmup_ratio=0.0,
        generate_in=[],
    )
    curve = LossCurve(str(folder))
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        accumulate_grad_batches=1 if devices == 1 else 2,
        max_epochs=2,
        gradient_clip_val=task.get("clip"),
        inference_mode=False,
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        callbacks=[
            PMSSCallback(rank=8, output_dir=folder / "out", merge_on_save=None),
            curve,
            Saving(folder, task.get("save", ["inside.ckpt"])),
            *([FlatLoRA(sigma=0.5, same_on_ranks=True)] if task.get("noise") else []),
        ],
    )
    trainer.fit(module, Batches(devices == 1), ckpt_path=task.get("checkpoint"))
    record = {"steps": trainer.global_step, "curve": curve.points()[0]}
    (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(record))
    return trainer


if __name__ == "__main__":
    torch.set_num_threads(1)
    for given in json.loads(sys.argv[1]):
        Path(given["folder"]).mkdir(parents=True, exist_ok=True)
        run(given, make_strategy(given["strategy"]), devices=2)
    leave()
