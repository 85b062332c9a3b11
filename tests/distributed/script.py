"""One rank of a two-process run: ``python -m tests.distributed.script JSON``; rank r writes ``rank<r>.json``.

The JSON object: folder, strategy, and optionally checkpoint, steps, precision, late (built in configure_model), meta (built on the
meta device, from a skeleton file), callback (options of PMSSCallback), differ (rank-dependent seed), then (what follows fit
in the same process: "validate", "fit" or "update").
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from lightning_pmss import PMSSCallback, model_built
from lightning_pmss.conversion import conversion_of, pmss_layers
from lightning_pmss.datamodules.sampler import LengthGroupedSampler, ResumableDataLoader, TrainerProgress
from lightning_pmss.gathering import whole_update
from lightning_pmss.whole import clean_name
from tests.distributed.strategies import make_strategy

WIDTH, VOCABULARY, LENGTH, EXAMPLES = 32, 40, 12, 32


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))
        return out


class Language(nn.Module):
    _no_split_modules = ("Block",)

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(self.norm(x))
        return out


def base_model() -> Language:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Language()


class Module(L.LightningModule):
    def __init__(self, task: dict[str, Any]) -> None:
        super().__init__()
        self.task = task
        self.losses: list[float] = []
        self.scores: list[float] = []
        self.frozen_gradients = -1
        self.net: Any = None if task["late"] else base_model()

    def configure_model(self) -> None:
        if self.net is not None:
            return
        if self.task["differ"]:
            torch.manual_seed(100 + int(os.environ.get("LOCAL_RANK", 0)))
            self.net = Language()
        elif self.task["meta"]:
            with torch.device("meta"):
                self.net = Language()
        else:
            self.net = base_model()
        if self.task["strategy"].startswith("fsdp2"):
            model_built(self)
            mesh = self.device_mesh["data_parallel"]  # type: ignore[index]
            for block in self.net.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(self.net, mesh=mesh)

    def loss(self, batch: Any) -> Tensor:
        (tokens,) = batch
        logits = self.net(tokens[:, :-1])
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.scores.append(self.loss(batch).item())

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.scores.append(self.loss(batch).item())

    def on_after_backward(self) -> None:
        self.frozen_gradients = sum(p.grad is not None for p in self.parameters() if not p.requires_grad)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.02)


def examples() -> TensorDataset:
    return TensorDataset(torch.randint(0, VOCABULARY, (EXAMPLES, LENGTH), generator=torch.Generator().manual_seed(3)))


class Sentences(L.LightningDataModule):
    """Shuffled and resumable in the middle of an epoch (four steps on two ranks)."""

    def train_dataloader(self) -> Any:
        assert self.trainer is not None
        sampler = LengthGroupedSampler([1] * EXAMPLES, 4, 5, self.trainer.world_size, self.trainer.global_rank)
        return ResumableDataLoader(examples(), sampler=sampler, progress=TrainerProgress(self.trainer), batch_size=4)

    def val_dataloader(self) -> Any:
        return DataLoader(examples(), batch_size=4)

    test_dataloader = val_dataloader


def make_trainer(task: dict[str, Any], callback: L.Callback | None, *more: L.Callback) -> L.Trainer:
    options: dict[str, Any] = {} if task["strategy"] == "single" else {"strategy": make_strategy(task["strategy"])}
    return L.Trainer(
        accelerator="cpu",
        devices=1 if task["strategy"] == "single" else 2,
        max_steps=task["steps"],
        precision=task["precision"],
        inference_mode=task["inference_mode"],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(more),
        default_root_dir=task["folder"],
        callbacks=[c for c in (callback, *more) if c is not None],
        **options,
    )


def main(task: dict[str, Any]) -> None:
    defaults = {
        "steps": 4, "precision": "32-true", "late": True, "meta": False, "differ": False, "callback": {}, "checkpoint": None,
        "then": None, "inference_mode": False, "weights_only": False,
    }  # fmt: skip
    task = defaults | task
    folder = Path(task["folder"])
    module = Module(task)
    callback = PMSSCallback(**{"rank": 8, "output_dir": str(folder / "out")} | task["callback"])
    saver = ModelCheckpoint(
        folder / "saved", "{step}", every_n_train_steps=2, save_top_k=-1, save_weights_only=task["weights_only"]
    )
    trainer = make_trainer(task, callback, saver)
    record: dict[str, Any] = {}
    try:
        trainer.fit(module, Sentences(), ckpt_path=task["checkpoint"])
        layers = pmss_layers(module)
        record["indices"] = {n: [x.rows.tolist(), x.cols.tolist()] for n, x in layers.items()}
        record["requires_grad"] = sorted(clean_name(n) for n, p in module.named_parameters() if p.requires_grad)
        if task["then"] == "validate":
            module.scores.clear()
            trainer.validate(module, Sentences(), verbose=False)
        elif task["then"] == "fit":
            trainer.fit_loop.max_steps = 2 * task["steps"]  # type: ignore[misc]
            trainer.fit(module, Sentences())
        elif task["then"] == "update":
            root: Any = trainer.strategy.model
            record["update"] = {n: whole_update(root, x).tolist() for n, x in layers.items()}
    except Exception as error:
        record["error"] = f"{type(error).__name__}: {error}"
        if task.get("raise"):
            raise
    assert conversion_of(module) is not None or "error" in record
    record |= {"losses": module.losses, "scores": module.scores, "frozen_gradients": module.frozen_gradients}
    (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(record))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # else gloo's threads may abort the interpreter on its way out


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(json.loads(sys.argv[1]))
