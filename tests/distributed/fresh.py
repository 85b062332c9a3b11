"""A frozen fresh head and added tokens on two processes: ``python -m tests.distributed.fresh JSON`` (a list of tasks)."""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import lightning as L
import torch
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lightning_pmss import PMSSCallback, PMSSWrapPolicy, model_built
from tests.distributed.strategies import make_strategy
from tests.leaving import leave

TOKENS = torch.randint(1, 300, (8, 6), generator=torch.Generator().manual_seed(0))


def build(kind: str, folder: str, seed: int) -> Any:
    """A model with tensors that are in no file of the base, of random values that depend on the seed."""
    torch.manual_seed(seed)
    if kind == "head":
        return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(model.config.vocab_size + 3)
    return model


class Module(L.LightningModule):
    """Built in ``__init__``."""

    def __init__(self, kind: str, folder: str, seed: int) -> None:
        super().__init__()
        self.kind = kind
        self.model: Any = build(kind, folder, seed)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (ids,) = batch
        loss: Tensor = self.model(ids, labels=ids[:, 0] % 3 if self.kind == "head" else ids).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.5)


class Sharded(Module):
    """What FSDP2 asks for."""

    def configure_model(self) -> None:
        model_built(self)
        mesh = self.device_mesh["data_parallel"]
        for block in self.model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)


def run(task: dict[str, Any]) -> None:
    options = {"auto_wrap_policy": PMSSWrapPolicy(["LlamaDecoderLayer"])} if task["strategy"] == "fsdp1" else {}
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=make_strategy(task["strategy"], **options),
        max_steps=2,
        inference_mode=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=task["folder"],
        callbacks=[PMSSCallback(rank=4, output_dir=Path(task["folder"]) / "out")],
    )
    module = (Sharded if task["strategy"] == "fsdp2" else Module)(task["kind"], task["model"], seed=1)
    trainer.fit(module, DataLoader(TensorDataset(TOKENS), batch_size=2))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for given in json.loads(sys.argv[1]):
        Path(given["folder"]).mkdir(parents=True, exist_ok=True)
        record: dict[str, Any] = {}
        try:
            run(given)
        except Exception:
            record["error"] = traceback.format_exc()
        (Path(given["folder"]) / f"rank{os.environ.get('LOCAL_RANK', '0')}.json").write_text(json.dumps(record))
    leave()
