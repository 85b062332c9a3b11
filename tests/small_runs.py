"""Short fits of a small LightningModule with an adapter, and the same on two processes, each with a record of its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_pmss import AdapterCallback, AdapterConfig
from lightning_pmss.conversion.convert import adapted_layers
from tests import forks
from tests.leaving import leave


def fit(
    batches: Callable[[], Any],
    folder: Path,
    module: L.LightningModule,
    config: AdapterConfig,
    *more: L.Callback,
    **options: Any,
) -> L.Trainer:
    """Train eight steps; the adapter is in ``folder/out``.

    Args:
        batches: Makes the training batches.
        folder: For what is written.
        module: The module.
        config: Of the adapter.
        *more: Callbacks behind the adapter's.
        **options: Of the Trainer; ``loader`` for other batches, ``checkpoint`` to resume, ``merge`` for ``merge_on_save``.
    """
    checkpoint, loader = options.pop("checkpoint", None), options.pop("loader", None) or batches()
    settings: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "max_steps": 8, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "default_root_dir": folder,
    }  # fmt: skip
    callback = AdapterCallback(config, output_dir=folder / "out", merge_on_save=options.pop("merge", None))
    saves = {"enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in more)}
    trainer = L.Trainer(**settings | saves | options, callbacks=[callback, *more])
    trainer.fit(module, loader, ckpt_path=checkpoint)
    return trainer


def fit_on_two(module: Any, config: AdapterConfig, loader: Any) -> None:
    """Train four steps under DDP as one of the two processes of `two_runs`, write a record, and end this process.

    Args:
        module: With a list ``losses``.
        config: Of the adapter.
        loader: Training batches of both processes.
    """
    folder, checkpoint = Path(sys.argv[1]), sys.argv[2] or None
    saver = ModelCheckpoint(folder / "saved", "{step}", every_n_train_steps=2, save_top_k=-1)
    options: dict[str, Any] = {"devices": 2, "strategy": "ddp", "max_steps": 4, "checkpoint": checkpoint}
    trainer = fit(lambda: loader, folder, module, config, saver, **options)
    layers = adapted_layers(module)
    record = {
        "losses": module.losses,
        "numbers": {n: [t.double().sum().item() for t in x.core.trained().values()] for n, x in layers.items()},
        "ran": {n: x.ran() for n, x in layers.items()},
    }
    (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(record))
    leave()


def two_runs(script: str, folder: Path) -> list[dict[str, Any]]:
    """Run a script that ends in `fit_on_two`, whole and resumed after two of four steps, and check what holds for all.

    Returns:
        The records of the two ranks of the whole run; its files are in ``folder/whole``.
    """

    def run(own: Path, checkpoint: str) -> list[dict[str, Any]]:
        own.mkdir()
        done = forks.run(["-m", script, own, checkpoint])
        assert done.returncode == 0, done.stderr[-3000:]
        return [json.loads((own / f"rank{rank}.json").read_text()) for rank in (0, 1)]

    first, second = run(folder / "whole", "")
    assert first["numbers"] == second["numbers"]
    assert first["losses"] != second["losses"]
    again = run(folder / "again", str(folder / "whole" / "saved" / "step=2.ckpt"))
    assert [r["losses"] for r in again] == [first["losses"][2:], second["losses"][2:]]
    assert again[0]["numbers"] == first["numbers"]
    return [first, second]
