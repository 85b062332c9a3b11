"""Facts about a run, for the model card beside its adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L

from lightning_pmss.callbacks.processing import processing_of
from lightning_pmss.callbacks.throughput import SHORT


def figures(trainer: L.Trainer) -> dict[str, float]:
    """Last value of each logged metric, except speed and memory."""
    metrics = trainer.callback_metrics.items()
    return {k: float(v) for k, v in metrics if not k.startswith("pmss/") and k not in SHORT.values()}


def run_facts(
    trainer: L.Trainer, module: L.LightningModule, earlier: Mapping[str, float], stopped: str | None
) -> dict[str, dict[str, Any]]:
    """Sections of a model card: training settings, and the last value of each metric; equal on all ranks.

    Args:
        trainer: Trainer of this run.
        module: The trained module.
        earlier: Metrics from the checkpoint that the run resumed.
        stopped: Signal or error that stopped the training early; None without one.
    """
    data: Any = getattr(trainer, "datamodule", None)
    training: dict[str, Any] = {"module": type(module).__name__}
    if data is not None:
        training["data"] = type(data).__name__
        training |= {name: getattr(data, name) for name in ("path", "prompt_style") if getattr(data, name, None)}
    names = [getattr(part, "name_or_path", None) for part in processing_of(trainer, module)]
    if named := [name for name in names if isinstance(name, str) and name]:
        training["tokenizer"] = named[0]
    training["optimizer steps"] = trainer.global_step
    if stopped is not None:
        training["not finished"] = f"stopped by {stopped}"
    if trainer.optimizers:
        optimizer = trainer.optimizers[0]
        group = optimizer.param_groups[0]
        training["optimizer"] = type(getattr(optimizer, "optimizer", optimizer)).__name__
        # A schedule lowers `lr`, and keeps its first value in `initial_lr`.
        training["learning rate"] = group.get("initial_lr", group.get("lr"))
    training["precision"] = str(trainer.precision)
    training["strategy"] = f"{type(trainer.strategy).__name__}, {trainer.world_size} processes"
    known = {**earlier, **figures(trainer)}
    return {"Training": training} | ({"Figures, last logged": known} if known else {})
