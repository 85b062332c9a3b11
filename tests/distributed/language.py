"""CausalLMModule and GSM8KDataModule on two processes: ``python -m tests.distributed.language JSON``; see `main`."""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_pmss import PMSSCallback
from lightning_pmss.conversion import pmss_layers
from lightning_pmss.datamodules import GSM8KDataModule
from lightning_pmss.metrics import GSM8KAccuracy
from lightning_pmss.modules import CausalLMModule
from tests.distributed.strategies import make_strategy


class Recording(CausalLMModule):
    """Notes the losses and whether frozen parameters got gradients."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.__dict__.setdefault("losses", []).append(loss.item())
        return loss

    def on_after_backward(self) -> None:
        self.frozen_gradients = sum(p.grad is not None for p in self.parameters() if not p.requires_grad)


def main(task: dict[str, Any]) -> None:
    """Fit, validate and, where asked, generate, as ``task`` says."""
    folder = Path(task["folder"])
    torch.manual_seed(0)
    module = Recording(
        task["model"],
        warmup_ratio=0.0,
        gradient_checkpointing=task.get("checkpointing", False),
        metric=GSM8KAccuracy() if task.get("generate") else None,
        generate_in=["validate"] if task.get("generate") else [],
        max_new_tokens=4,
        dtype=task.get("dtype", "auto"),
    )
    data = GSM8KDataModule(task["model"], path=task["data"], batch_size=2, eval_batch_size=2, val_size=5)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    options = {} if task["strategy"] == "single" else {"strategy": make_strategy(task["strategy"])}
    saver = ModelCheckpoint(folder / "saved", "{step}", every_n_train_steps=2, save_top_k=-1)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1 if task["strategy"] == "single" else 2,
        max_steps=task.get("steps", 4),
        precision=task.get("precision", "32-true"),
        inference_mode=False,
        gradient_clip_val=task.get("clip"),
        limit_val_batches=task.get("val_batches", 1.0),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[PMSSCallback(**{"rank": 8, "output_dir": folder / "out"} | task.get("callback", {})), saver],
        **options,  # type: ignore[arg-type]
    )
    trainer.fit(module, data, ckpt_path=task.get("checkpoint"))
    record = {
        "losses": module.__dict__["losses"],
        "metrics": {k: float(v) for k, v in trainer.callback_metrics.items()},
        "frozen_gradients": module.frozen_gradients,
        "indices": {n: [x.rows.tolist(), x.cols.tolist()] for n, x in pmss_layers(module).items()},
        "dtypes": sorted({str(p.dtype) for p in module.parameters() if p.requires_grad}),
        "memory_growth": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before,
    }
    (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(record))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # else gloo's threads may abort the interpreter on its way out


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(json.loads(sys.argv[1]))
