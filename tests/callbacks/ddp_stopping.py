"""Script of the tests of stopping two processes: ``python -m tests.callbacks.ddp_stopping JSON``.

Rank r writes ``<folder>/rank<r>.json``: the losses of its steps, and the error that it ended with.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_pmss import PMSSCallback
from tests.callbacks.toys import Numbers, Toy, trainer
from tests.leaving import leave

DEFAULTS: dict[str, Any] = {
    "checkpoint": None,
    "seconds": 0.0,  # per step
    "raises": None,  # [rank, batch]: an error of the user's code there
    "output": "out",
}


class Module(Toy):
    def __init__(self, task: dict[str, Any]) -> None:
        super().__init__()
        self.task = task

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_rank == 0:
            print("step", flush=True)
        time.sleep(self.task["seconds"])
        if [self.global_rank, len(self.losses)] == self.task["raises"]:
            raise ValueError("of the user")
        return super().training_step(batch, batch_idx)


def run(task: dict[str, Any]) -> None:
    folder = Path(task["folder"])
    callback = PMSSCallback(rank=6, dropout=0.3, output_dir=folder / task["output"])
    saver = ModelCheckpoint(folder / "saved", "{step}", every_n_train_steps=4, save_last=True)
    runner = trainer(folder, callback, saver, devices=2, strategy="ddp", max_epochs=6)
    torch.manual_seed(17 + runner.global_rank)
    module, error = Module(task), None
    try:
        runner.fit(module, Numbers(), ckpt_path=task["checkpoint"])
    except BaseException as caught:
        error = caught
    record = {"losses": module.losses, "error": None if error is None else f"{type(error).__name__}: {error}"}
    (folder / f"rank{runner.global_rank}.json").write_text(json.dumps(record))
    if error is not None:
        raise error


if __name__ == "__main__":
    given = DEFAULTS | json.loads(sys.argv[1])
    Path(given["folder"]).mkdir(parents=True, exist_ok=True)
    run(given)
    leave()
