"""Measure and log the speed, memory and update norms of training steps."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_pmss.conversion.convert import adapted_layers
from lightning_pmss.distributed.gathering import whole_updates
from lightning_pmss.files.process_memory import peak_memory
from lightning_pmss.methods.method import Update

# Names in the progress bar, which has little room.
SHORT = {"pmss/tokens_per_second": "tok/s", "pmss/peak_memory_gb": "peak GB"}


class StepClock:
    """Measure training steps by wall time, from the start of a batch to its end."""

    def __init__(self) -> None:
        self._started = 0.0

    def start(self) -> None:
        """Start the clock at the beginning of a batch."""
        self._started = time.perf_counter()

    def log(self, trainer: L.Trainer, module: L.LightningModule, batch: Any) -> None:
        """Log the figures of a completed step, and show some of them in the progress bar."""
        values = self.figures(batch, trainer.world_size)
        if (peak := peak_memory_gb(module.device)) is not None:
            values["pmss/peak_memory_gb"] = peak
        module.log_dict(values, on_step=True, on_epoch=False, batch_size=1)
        shown = {SHORT[name]: value for name, value in values.items() if name in SHORT}
        module.log_dict(shown, prog_bar=True, logger=False, on_step=True, on_epoch=False, batch_size=1)

    def figures(self, batch: Any, world_size: int) -> dict[str, float]:
        """Seconds since `start` and, for a language model's batch, tokens per second over all processes."""
        seconds = time.perf_counter() - self._started
        values = {"pmss/step_seconds": seconds}
        if (tokens := _tokens(batch)) is not None:
            values["pmss/tokens_per_second"] = tokens * world_size / seconds
        return values


def log_u_norms(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Log the Frobenius norm of each layer's stored update (of PMSS: ``s U``) after the steps that Lightning logs."""
    connector = trainer._logger_connector
    if trainer.fit_loop._should_accumulate() or not connector.should_update_logs:
        return
    norms = {f"pmss/u_norm/{name}": _norm(update) for name, update in whole_updates(module, adapted_layers(module))}
    # Lightning would log the values again with later batches, which have other norms.
    module.log_dict(norms, logger=False, on_step=True, on_epoch=False, batch_size=1)
    connector.log_metrics(norms)


def _norm(update: Update) -> Tensor:
    return torch.stack([torch.linalg.vector_norm(value) for value in update.numbers().values()]).norm()


def peak_memory_gb(device: torch.device) -> float | None:
    """Peak memory so far in 10^9 bytes: allocated on a CUDA device, else the resident memory of this process.

    None where the system does not report the memory of a process (Windows).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = peak_memory()
    return None if peak is None else peak / 1e9


def _tokens(batch: Any) -> int | None:
    """Number of tokens in a language model's batch; None for any other batch."""
    if not isinstance(batch, Mapping):
        return None
    if isinstance(mask := batch.get("attention_mask"), Tensor):
        return int(mask.sum())
    return ids.numel() if isinstance(ids := batch.get("input_ids"), Tensor) else None
