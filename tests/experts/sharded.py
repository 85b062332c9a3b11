"""One rank of runs on a small mixture: ``python -m tests.experts.sharded JSON``, a list of tasks for `launch`.

Each step has two sequences of different lengths, so short that some experts get no token of one of them. One process takes
both, each of two processes one; the loss is the mean over all tokens, so that every run has the same gradients.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.utils.data import DataLoader

from lightning_pmss import AdapterCallback, model_built
from lightning_pmss.conversion.convert import adapted_layers
from lightning_pmss.layers.parts import clean_name, fill, outside_zero_init, own_part
from tests.distributed.strategies import make_strategy
from tests.experts.toys import MIXTURES, mixture
from tests.leaving import leave
from tests.methods.cases import CASES

STEPS = 4
EXPERTS = 7  # no multiple of two
COUNTS = {"mixtral": "num_local_experts", "gpt_oss": "num_local_experts"}  # what the configs call it
LENGTHS = [(2, 4), (3, 2)]  # of the two sequences of each step of an epoch


def sequences() -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(11)
    return [[torch.randint(0, 64, (1, length), generator=generator) for length in step] for step in LENGTHS]


class Sharded(L.LightningModule):
    def __init__(self, task: dict[str, Any]) -> None:
        super().__init__()
        self.task = task
        self.model: Any = None
        self.losses: list[float] = []
        self.held: dict[str, int] = {}

    def configure_model(self) -> None:
        if self.model is not None:
            return
        self.model = self.build()
        if self.task.get("checkpointing"):
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if self.task["strategy"].startswith("fsdp2"):
            self.shard()

    def build(self, seed: int = 0) -> Any:
        name = self.task["model"]
        sizes = {"num_hidden_layers": 1, COUNTS.get(name, "num_experts"): EXPERTS}
        with outside_zero_init():
            whole = mixture(name, seed=seed, **sizes)
        if self.task["strategy"] != "zero3":
            return whole
        model = MIXTURES[name](**sizes)  # in parts as soon as it is made
        for own, value in zip(model.parameters(), whole.parameters(), strict=True):
            fill(own, value)
        return model

    def shard(self) -> None:
        late = self.task.get("late")
        state = self.model.state_dict()
        if late:
            self.model = self.build(seed=3)
        model_built(self)
        mesh = self.device_mesh["data_parallel"]  # type: ignore[index]
        for block in self.model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        if late:  # the base's weights come when the model is converted and sharded
            own = self.model.state_dict()
            parts = {n: distribute_tensor(t, own[n].device_mesh, own[n].placements) for n, t in state.items()}
            self.model.load_state_dict(parts, strict=False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        own = batch if self.trainer.world_size == 1 else [batch[self.global_rank]]
        total = sum(ids.shape[1] - 1 for ids in batch)
        loss = sum(self.sum_over_tokens(ids) for ids in own) * self.trainer.world_size / total
        assert isinstance(loss, Tensor)
        self.losses.append(loss.item())
        return loss

    def sum_over_tokens(self, ids: Tensor) -> Tensor:
        logits = self.model(ids).logits[0, :-1]
        return nn.functional.cross_entropy(logits.float(), ids[0, 1:], reduction="sum")

    def on_train_start(self) -> None:
        self.held = {clean_name(n): own_part(p).numel() for n, p in self.named_parameters() if ".experts." in n}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.02)


def run(task: dict[str, Any]) -> None:
    folder, plain = Path(task["folder"]), task["strategy"] == "plain"
    more = {"logging_batch_size_per_gpu": 1} if task["strategy"].startswith("zero") else {}
    torch.manual_seed(1)
    module = Sharded(task)
    loader: Any = DataLoader(sequences(), batch_size=None)  # type: ignore[arg-type]
    config = CASES[task["method"]](rank=4, **task.get("options", {}))
    saver = ModelCheckpoint(folder / "saved", "{step}", every_n_train_steps=2, save_top_k=-1)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1 if plain else 2,
        strategy="auto" if plain else make_strategy(task["strategy"], **more),
        use_distributed_sampler=False,
        max_steps=task.get("steps", STEPS),
        precision=task.get("precision", "32-true"),
        inference_mode=False,
        logger=False,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[AdapterCallback(config, output_dir=folder / "out", log_u_norm=True), saver],
    )
    record: dict[str, Any] = {}
    try:
        trainer.fit(module, loader, ckpt_path=task.get("checkpoint"))
        record["ran"] = {n: x.ran() for n, x in adapted_layers(module).items()}
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        record["error"] = f"{type(error).__name__}: {error}"  # `launch` fails on it unless the task says "raises"
    record |= {
        "losses": module.losses,
        "norms": {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("pmss/u_norm/")},
        "held": module.held,
    }
    (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for given in json.loads(sys.argv[1]):
        Path(given["folder"]).mkdir(parents=True, exist_ok=True)
        run(given)
    leave()
