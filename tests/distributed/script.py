"""One rank of a two-process run: ``python -m tests.distributed.script JSON``; rank r writes ``<folder>/rank<r>.json`` per task.

The JSON is a list of tasks, done one after the other with fresh modules and Trainers; `DEFAULTS` says what a task can hold.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from lightning_pmss import AdapterCallback, PMSSCallback, model_built
from lightning_pmss.conversion.convert import adapted_layers
from lightning_pmss.datamodules.sampler import LengthGroupedSampler, ResumableDataLoader, TrainerProgress
from lightning_pmss.distributed.gathering import gathered, whole_updates
from lightning_pmss.layers.parts import clean_name
from tests.distributed.strategies import make_strategy
from tests.leaving import leave
from tests.methods.cases import CASES

WIDTH, VOCABULARY, LENGTH, EXAMPLES = 32, 40, 12, 32
DEFAULTS: dict[str, Any] = {
    "strategy": "ddp",
    "steps": 4,
    "lr": 0.02,
    "checkpoint": None,
    "method": "pmss",
    "callback": {},  # options of the method's configuration, and of PMSSCallback
    "precision": "32-true",
    "inference_mode": False,
    "late": True,  # the model is built in configure_model
    "meta": False,  # ... on the meta device, and its weights come after sharding (FSDP2)
    "careless": False,  # ... and sharded without model_built (FSDP2)
    "compiled": False,  # torch.compile around the network
    "differ": False,  # weights from a rank-dependent seed
    "mixing": False,  # the blocks have a convolution along the sentence
    "head": False,  # a fresh head trains in full
    "weights_only": False,
    "one_file": False,  # every checkpoint overwrites the last one
    "poison": None,  # rank 1's loss is NaN in this batch
    "kill_at": None,  # rank 1 is killed when the checkpoint of this step is being made
    "stop_at": None,  # rank 1 gets Ctrl-C in this step
    "stamp": False,  # before the last checkpoint every rank fills its part of U with its own number
    "only": None,  # "test" instead of fit
    "raises": None,  # part of the message of an error that every rank must end with
    "then": None,  # "validate" or "fit" with the same Trainer after fit
}


class Block(nn.Module):
    def __init__(self, mixing: bool = False) -> None:
        super().__init__()
        self.mix = nn.Conv1d(WIDTH, WIDTH, 3, padding=1) if mixing else None
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.mix is None else x + self.mix(x.transpose(1, 2)).transpose(1, 2)
        out: Tensor = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return out


class Language(nn.Module):
    _no_split_modules = ("Block",)

    def __init__(self, mixing: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block(mixing) for _ in range(3))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(self.norm(x))
        return out


def base_model(mixing: bool = False) -> Language:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Language(mixing)


class Module(L.LightningModule):
    def __init__(self, task: dict[str, Any]) -> None:
        super().__init__()
        self.task = task
        self.losses: list[float] = []
        self.scores: list[float] = []
        self.frozen_gradients = -1
        self.parts: dict[str, list[float]] = {}
        self.net: Any = None if task["late"] else base_model(task["mixing"])

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
            self.net = base_model(self.task["mixing"])
        if self.task["strategy"].startswith("fsdp2"):
            self.shard()
        if self.task["compiled"]:
            self.net = torch.compile(self.net, backend="eager")

    def shard(self) -> None:
        if not self.task["careless"]:
            model_built(self)
        mesh = self.device_mesh["data_parallel"]  # type: ignore[index]
        for block in self.net.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.net, mesh=mesh)
        if self.task["meta"]:
            self.net.to_empty(device="cpu")
            for module in self.net.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
            whole = base_model() if self.task["meta"] != "wrong" else Language()
            options = StateDictOptions(full_state_dict=True, strict=False)
            set_model_state_dict(self.net, whole.state_dict(), options=options)  # type: ignore[arg-type]

    def loss(self, batch: Any) -> Tensor:
        (tokens,) = batch
        logits = self.net(tokens[:, :-1])
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        if self.task["poison"] == len(self.losses) and self.global_rank == 1:
            loss = loss * float("nan")
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.scores.append(self.loss(batch).item())

    test_step = validation_step

    def on_train_start(self) -> None:
        self.parts = {n: _part(p).flatten().tolist() for n, p in self.trained().items()}

    def on_after_backward(self) -> None:
        self.frozen_gradients = sum(p.grad is not None for p in self.parameters() if not p.requires_grad)

    def trained(self) -> dict[str, nn.Parameter]:
        return {clean_name(n): p for n, p in self.named_parameters() if p.requires_grad}

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.task["lr"])


def _part(parameter: nn.Parameter) -> Tensor:
    """What this rank holds of a parameter."""
    whole_or_part = getattr(parameter, "ds_tensor", parameter.detach())
    local: Tensor = getattr(whole_or_part, "_local_tensor", whole_or_part)
    return local


class Sentences(L.LightningDataModule):
    """Shuffled and resumable in the middle of an epoch (four steps on two ranks)."""

    def train_dataloader(self) -> Any:
        assert self.trainer is not None
        sampler = LengthGroupedSampler([1] * EXAMPLES, 4, 5, self.trainer.world_size, self.trainer.global_rank)
        progress = TrainerProgress(self.trainer)
        return ResumableDataLoader(self.examples(), sampler=sampler, progress=progress, batch_size=4)

    def val_dataloader(self) -> Any:
        return DataLoader(self.examples(), batch_size=4)

    test_dataloader = val_dataloader

    def examples(self) -> TensorDataset:
        generator = torch.Generator().manual_seed(3)
        return TensorDataset(torch.randint(0, VOCABULARY, (EXAMPLES, LENGTH), generator=generator))


class Incidents(L.Callback):
    """What goes wrong, or is marked, on purpose."""

    def __init__(self, task: dict[str, Any]) -> None:
        self.task = task

    def on_before_zero_grad(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        if self.task["stop_at"] == trainer.global_step + 1 and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGINT)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        if self.task["stamp"] and trainer.global_step == self.task["steps"]:
            for parameter in pl_module.trained().values():
                _part(parameter).fill_(trainer.global_rank + 1.0)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: Any) -> None:
        if trainer.global_step == self.task["kill_at"] and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def run(task: dict[str, Any]) -> None:
    folder = Path(task["folder"])
    torch.manual_seed(1 + (task["checkpoint"] is not None))
    module = Module(task)
    also = {"also_train": ["head"]} if task["head"] else {}
    options = {"rank": 8} | also | task["callback"]
    callback: AdapterCallback
    if task["method"] == "pmss":
        callback = PMSSCallback(output_dir=folder / "out", **options)
    else:
        callback = AdapterCallback(CASES[task["method"]](**options), output_dir=folder / "out")
    saver = ModelCheckpoint(
        folder / "saved",
        "last" if task["one_file"] else "{step}",
        every_n_train_steps=2,
        save_top_k=1 if task["one_file"] else -1,
        save_weights_only=task["weights_only"],
        enable_version_counter=False,
    )
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=make_strategy(task["strategy"]),
        max_steps=task["steps"],
        precision=task["precision"],
        inference_mode=task["inference_mode"],
        logger=False,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[callback, Incidents(task), saver],
    )
    record: dict[str, Any] = {}
    try:
        if task["only"] == "test":
            trainer.test(module, Sentences(), ckpt_path=task["checkpoint"], verbose=False)
        else:
            trainer.fit(module, Sentences(), ckpt_path=task["checkpoint"])
            root: Any = trainer.strategy.model
            updates = {n: update.numbers() for n, update in whole_updates(root, adapted_layers(module))}
            record["updates"] = {n: list(numbers.values())[-1].tolist() for n, numbers in updates.items()}
            record["sums"] = _sums(root, module)
        module.scores.clear() if task["then"] else None
        if task["then"] == "validate":
            trainer.validate(module, Sentences(), verbose=False)
        elif task["then"] == "fit":
            trainer.fit_loop.epoch_loop.max_steps = 2 * task["steps"]
            trainer.fit(module, Sentences())
    except (Exception, SystemExit) as error:
        if task["kill_at"]:  # what rank 0 sees of it
            raise
        traceback.print_exc()
        record["error"] = f"{type(error).__name__}: {error}"  # `launch` fails on it unless the task says "raises"
    record |= {
        "losses": module.losses,
        "scores": module.scores,
        "frozen_gradients": module.frozen_gradients,
        "trained": sorted(module.trained()),
        "parts": module.parts,
        "norms": {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("pmss/u_norm/")},
        "indices": {n: [i.tolist() for i in x.indices().values()] for n, x in adapted_layers(module).items()},
    }
    (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(record))


def _sums(root: Any, module: Module) -> dict[str, float]:
    """The sum of each layer's rows and columns, read through `gathered`."""
    sums = {}
    for name, layer in adapted_layers(module).items():
        with gathered(root, layer):
            sums[name] = sum(float(part.double().sum()) for part in layer.reads())
    return sums


if __name__ == "__main__":
    torch.set_num_threads(1)
    for given in json.loads(sys.argv[1]):
        Path(given["folder"]).mkdir(parents=True, exist_ok=True)
        run(DEFAULTS | given)
    leave()
