"""What a run knows of itself, for the model card beside its adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L

from lightning_pmss.callbacks.processing import processing_of
from lightning_pmss.callbacks.throughput import SHORT


def figures(trainer: L.Trainer) -> dict[str, float]:
    """The last value of each metric that was logged, but for the speed and memory of this process."""
    metrics = trainer.callback_metrics.items()
    return {k: float(v) for k, v in metrics if not k.startswith("pmss/") and k not in SHORT.values()}


def run_facts(
    trainer: L.Trainer, module: L.LightningModule, earlier: Mapping[str, float], stopped: str | None
) -> dict[str, dict[str, Any]]:
    """Sections of a model card: how it was trained, and the last value of each metric; the same on every rank.

    Args:
        trainer: Of this run.
        module: What was trained.
        earlier: Figures of the checkpoint that the run went on from.
        stopped: What stopped the training before its end; None: nothing did.
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
        # With a schedule the rate has fallen by now; the schedule keeps the one it began with.
        training["learning rate"] = group.get("initial_lr", group.get("lr"))
    training["precision"] = str(trainer.precision)
    training["strategy"] = f"{type(trainer.strategy).__name__}, {trainer.world_size} processes"
    known = {**earlier, **figures(trainer)}
    return {"Training": training} | ({"Figures, last logged": known} if known else {})
