"""What is noted down while a run trains: losses, norms of gradients, seconds, and the bytes that a step keeps."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from typing_extensions import override


class Watch(Callback):
    """Notes each step's loss, norm of the gradient before it is clipped, and CPU (on a GPU: wall) seconds; one step's bytes."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.gradient_norms: list[float] = []
        self.seconds: list[float] = []
        self.saved_bytes = 0
        self.trainable = 0
        self._hooks: Any = None
        self._start = 0.0

    def _clock(self, module: L.LightningModule) -> float:
        if module.device.type == "cuda":
            torch.cuda.synchronize(module.device)
            return time.perf_counter()
        return time.process_time()  # other work on the machine is not the method's

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        unused = sum(getattr(module, "unused", 0) for module in pl_module.modules())
        self.trainable = sum(p.numel() for p in pl_module.parameters() if p.requires_grad) - unused

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._start = self._clock(pl_module)
        if trainer.global_step == 1:  # the first step may still set things up
            weights = {p.untyped_storage().data_ptr() for p in pl_module.parameters()}
            seen: set[int] = set()

            def note(tensor: Tensor) -> Tensor:
                place = tensor.untyped_storage().data_ptr()
                if place not in weights and place not in seen:
                    seen.add(place)
                    self.saved_bytes += tensor.untyped_storage().nbytes()
                return tensor

            self._hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
            self._hooks.__enter__()

    @override
    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        if self._hooks is not None:
            self._hooks.__exit__()
            self._hooks = None

    @override
    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        norms = [p.grad.norm() for p in pl_module.parameters() if p.grad is not None]
        self.gradient_norms.append(float(f"{float(torch.stack(norms).norm()):.3g}"))

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(round(float(outputs["loss"]), 4))
        self.seconds.append(self._clock(pl_module) - self._start)
