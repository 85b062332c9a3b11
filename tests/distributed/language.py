"""CausalLMModule and GSM8KDataModule on two processes: ``python -m tests.distributed.language JSON`` (a list of tasks)."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import lightning as L
import torch

from lightning_pmss import PMSSCallback
from lightning_pmss.conversion.convert import adapted_layers
from lightning_pmss.datamodules import GSM8KDataModule
from lightning_pmss.metrics import GSM8KAccuracy
from lightning_pmss.modules import CausalLMModule
from tests.distributed.strategies import make_strategy
from tests.leaving import leave


class Recording(CausalLMModule):
    """Notes losses and texts, and whether frozen parameters got gradients."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.losses: list[float] = []
        self.texts: list[list[str]] = []  # of each validation
        self.frozen_gradients = -1

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.item())
        return loss

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self.texts.append([])

    def generate(self, prompt_ids: Any, prompt_mask: Any) -> list[str]:
        texts = super().generate(prompt_ids, prompt_mask)
        self.texts[-1].extend(texts)
        return texts

    def on_after_backward(self) -> None:
        self.frozen_gradients = sum(p.grad is not None for p in self.parameters() if not p.requires_grad)


def run(task: dict[str, Any]) -> None:
    folder = Path(task["folder"])
    torch.manual_seed(0)
    chosen = {"optimizer": lambda p: torch.optim.SGD(p, lr=1e3)} if task.get("clip") else {}
    if task.get("muon"):
        chosen = {"optimizer": lambda p: torch.optim.Muon(p, lr=1e-2, weight_decay=0.0)}
    module = Recording(
        task["model"],
        warmup_ratio=0.0,
        lr_schedule="constant",
        gradient_checkpointing=task.get("checkpointing", False),
        metric=GSM8KAccuracy() if task.get("generate") else None,
        generate_in=["validate"] if task.get("generate") else [],
        max_new_tokens=4,
        dtype=task.get("dtype", "auto"),
        **chosen,
    )
    data = GSM8KDataModule(task["model"], path=task["data"], batch_size=2, eval_batch_size=2, val_size=5)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=make_strategy(task["strategy"]),
        max_steps=task["steps"],
        precision=task.get("precision", "32-true"),
        inference_mode=False,
        gradient_clip_val=task.get("clip"),
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        callbacks=[PMSSCallback(rank=8, output_dir=folder / "out")],
    )
    trainer.fit(module, data)
    kinds = {flag: {str(p.dtype) for p in module.parameters() if p.requires_grad is flag} for flag in (True, False)}
    engine: Any = trainer.strategy.model
    groups = getattr(getattr(engine, "optimizer", None), "fp32_partitioned_groups_flat", None)  # ZeRO-3's own
    stepped = groups or [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
    record = {
        "losses": module.losses,
        "texts": module.texts,
        "metrics": {k: float(v) for k, v in trainer.callback_metrics.items()},
        "frozen_gradients": module.frozen_gradients,
        "indices": {n: [x.rows.tolist(), x.cols.tolist()] for n, x in adapted_layers(module).items()},
        "trained_dtypes": sorted(kinds[True]),
        "stepped_dtypes": sorted({str(p.dtype) for p in stepped}),
        "frozen_dtypes": sorted(kinds[False]),
        "rotary": [[str(b.dtype), b.tolist()] for n, b in module.named_buffers() if n.endswith("rotary_emb.inv_freq")],
    }
    (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for given in json.loads(sys.argv[1]):
        Path(given["folder"]).mkdir(parents=True, exist_ok=True)
        run(given)
    leave()
