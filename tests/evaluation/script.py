"""Evaluations on one or two processes: ``python -m tests.evaluation.script JSON``; see `main`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import lightning as L
import torch
from torch import Tensor

from lightning_pmss import PMSSCallback
from lightning_pmss.datamodules import CommonsenseDataModule, GSM8KDataModule
from lightning_pmss.metrics import CommonsenseAccuracy
from lightning_pmss.metrics.base import TextAccuracy
from lightning_pmss.modules import CausalLMModule
from tests.distributed.strategies import make_strategy
from tests.leaving import leave


class OddTexts(TextAccuracy):
    """Share of texts with an odd number of characters: a score that a model without sense gets right now and then."""

    def score(self, pred: str, target: str) -> float:
        return float(len(pred) % 2)


class Stopping(CausalLMModule):
    """Counts prompts; stops like a kill after so many batches."""

    def __init__(self, *args: Any, stop_after: int | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.asked, self.stop_after = 0, stop_after

    def generate(self, prompt_ids: Tensor, prompt_mask: Tensor) -> list[str]:
        if self.stop_after is not None and self.asked >= self.stop_after * 2:
            raise KeyError("killed")
        self.asked += len(prompt_ids)
        return super().generate(prompt_ids, prompt_mask)


def main(tasks: list[dict[str, Any]]) -> None:
    """Test once per task; rank r writes the logged values to ``<folder>/rank<r>.json``."""
    for task in tasks:
        choice = task.get("options", {}).get("answer_by") == "likelihood"
        metric: Any = CommonsenseAccuracy() if choice else OddTexts()
        folder = Path(task["folder"])
        module = Stopping(
            task["model"],
            metric=metric,
            predictions_dir=str(folder),
            **{"max_new_tokens": 8, **task.get("options", {})},
        )
        shared = {"eval_batch_size": 2, "val_size": 0, "cache_dir": task["cache"]}
        data: Any = GSM8KDataModule(task["model"], path=task["data"], **shared)
        if choice:
            data = CommonsenseDataModule(task["model"], path=task["choices"], test_path=task["choices"], **shared)
        single = task["strategy"] == "single"
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1 if single else 2,
            inference_mode=False,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            callbacks=[PMSSCallback(rank=4)],
            **({} if single else {"strategy": make_strategy(task["strategy"])}),  # type: ignore[arg-type]
        )
        try:
            logged = trainer.test(module, data, verbose=False)[0]
        except KeyError:
            if module.stop_after is None:
                raise
            logged = {}
        record = {"logged": logged, "asked": module.asked}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(record))
        part = folder / "predictions-test.rank1.jsonl"
        if not logged and trainer.global_rank == 1 and part.exists():  # the kill caught rank 1 in the middle of a line
            part.write_bytes(part.read_bytes()[:-3])


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(json.loads(sys.argv[1]))
    leave()
