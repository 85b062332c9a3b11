"""Script of the two-process test: ``python -m tests.callbacks.ddp FOLDER CHECKPOINT`` (empty: from the start)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_pmss import PMSSCallback
from lightning_pmss.conversion.convert import adapted_layers
from tests.callbacks.toys import Numbers, Toy, trainer
from tests.leaving import leave


class Differing(Toy):
    """Fresh weights differ between the ranks until DDP makes them equal, after the conversion."""

    def __init__(self) -> None:
        super().__init__()
        import os

        torch.manual_seed(int(os.environ.get("LOCAL_RANK", 0)))
        for parameter in self.net.parameters():
            torch.nn.init.normal_(parameter, std=0.3)


def run(folder: Path, checkpoint: str | None) -> tuple[Toy, L.Trainer]:
    module = Differing()
    callback = PMSSCallback(rank=6, dropout=0.3, output_dir=folder / "out", selection="lupp")
    saver = ModelCheckpoint(folder / "saved", "{step}", every_n_train_steps=2, save_top_k=-1)
    options: dict[str, Any] = {"devices": 2, "strategy": "ddp", "max_epochs": 3}
    runner = trainer(folder, callback, saver, **options)
    torch.manual_seed(17 + runner.global_rank)
    runner.fit(module, Numbers(), ckpt_path=checkpoint)
    return module, runner


if __name__ == "__main__":
    folder, checkpoint = Path(sys.argv[1]), sys.argv[2] or None
    module, runner = run(folder, checkpoint)
    layers = adapted_layers(module)
    record = {
        "indices": {n: [layer.rows.tolist(), layer.cols.tolist()] for n, layer in layers.items()},
        "u": {n: layer.core.weight.tolist() for n, layer in layers.items()},
        "losses": module.losses,
    }
    (folder / f"rank{runner.global_rank}.json").write_text(json.dumps(record))
    leave()
