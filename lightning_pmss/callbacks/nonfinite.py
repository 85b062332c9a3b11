"""A loss or gradient that is NaN or infinite stops the training before it reaches the trained tensors, or its step is left out.

After one such step Adam's moments and all trained tensors are NaN, and nothing that follows can mend them. All ranks decide
alike, and a device waits for its host once per optimizer step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_pmss.distributed.sharding import Engine
from lightning_pmss.layers.parts import clean_name, own_part
from lightning_pmss.messages import some
from lightning_pmss.methods.pmss.layer import PMSSLinear

ON_NONFINITE = ("stop", "skip")
_RANK = 1 << 20  # more than batches in a step
_MOST = 10  # steps left out one after the other: then it is not the data


class NonFiniteError(RuntimeError):
    """A loss or gradient that is NaN or infinite; raised on all ranks at the same step."""


class NonFiniteCheck:
    """Looks at each loss and, before each optimizer step, at the gradients.

    Args:
        action: ``stop`` or ``skip``.
        trainer: Of the fit.
        module: Converted.
        layers: Canonical name -> converted layer.
        engine: Of the strategy.

    Attributes:
        skipped: Optimizer steps that were left out.
        names_layers: Whether `GradientCheck` may stop at a gradient that is not finite, and name its layers.

    Raises:
        MisconfigurationException: ``skip`` under DeepSpeed, whose engine takes the gradients before anyone can.
    """

    def __init__(
        self, action: str, trainer: L.Trainer, module: nn.Module, layers: Mapping[str, PMSSLinear], engine: Engine
    ) -> None:
        if action == "skip" and engine == "zero":
            raise MisconfigurationException(
                "on_nonfinite='skip' is not possible under DeepSpeed, whose engine holds the gradients; type 'stop'."
            )
        self.action, self.trainer, self.module = action, trainer, module
        self.skipped = self._in_a_row = 0
        # On the ranks of a sharding engine gradients differ, and one rank that stops alone has the others wait.
        self.names_layers = action == "stop" and engine == "plain" and trainer.precision != "16-mixed"
        self._scaled = trainer.precision == "16-mixed"  # whose scaler leaves steps out that overflow, on purpose
        self._batches: list[tuple[int, int]] = []  # (epoch, batch) since the last optimizer step, the same on all ranks
        self._losses: list[Tensor] = []  # whether each of their losses is finite
        self._passed: list[Tensor] = []  # whether each gradient is finite that passed a core of an engine
        self._hooks = [x.core.register_forward_hook(self._watch) for x in layers.values()] if engine == "zero" else []

    def backward(self, loss: Tensor) -> None:
        """Note a loss whose backward pass begins."""
        loop = self.trainer.fit_loop.epoch_loop
        self._batches.append((self.trainer.current_epoch, loop.batch_idx))
        value = loss.detach()
        # The scaler's factor may have made it infinite, but not NaN.
        self._losses.append(~value.isnan().any() if self._scaled else value.isfinite().all())

    def before_step(self, optimizer: Any) -> bool:
        """Whether the step is to be left out; its gradients are gone then.

        Raises:
            NonFiniteError: A loss or gradient is not finite, and the action is ``stop``, or steps are left out all the time.
        """
        batches, losses, passed = self._batches, self._losses, self._passed
        self._batches, self._losses, self._passed = [], [], []
        gradients = [] if self._scaled or self._hooks else list(_gradients(optimizer))
        rank, place = self._worst(losses, passed, gradients)
        if rank is None:
            self._in_a_row = 0
            return False
        what = self._describe(rank, place, batches, optimizer)
        if self.action == "stop":
            raise NonFiniteError(
                f"{what}. The training stops before this step, so what was trained until now is intact. Look at the batch"
                " (no label that is trained on? values out of range?) and at the learning rate; on_nonfinite='skip' leaves"
                " such steps out."
            )
        self.skipped, self._in_a_row = self.skipped + 1, self._in_a_row + 1
        if self._in_a_row >= _MOST:
            raise NonFiniteError(f"{what}, and so it was in {_MOST} steps in a row: the training has diverged.")
        rank_zero_warn(f"{what}. The step is left out, the {self.skipped}. so far.", category=UserWarning)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        return True

    def close(self) -> None:
        """Take the hooks off."""
        while self._hooks:
            self._hooks.pop().remove()

    def _worst(self, losses: list[Tensor], passed: list[Tensor], gradients: list[Tensor]) -> tuple[int | None, int]:
        """(a rank where something is not finite, the place of the first such loss there or one behind the last)."""
        device, count = self.trainer.strategy.root_device, len(losses)
        others = list(passed)
        if gradients:
            others.append(torch.nn.utils.get_total_norm(gradients, norm_type=float("inf")).isfinite())
        fine = torch.stack(others).all() if others else torch.ones((), dtype=torch.bool, device=device)
        flags = torch.stack([flag.to(device) for flag in (*losses, fine)])
        # 0 where all is finite, else the larger the earlier; the largest number over the ranks tells a rank and its place.
        early = torch.arange(count + 1, 0, -1, device=device)
        code = torch.where(flags, 0, self.trainer.global_rank * _RANK + early).max()
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(code, op=torch.distributed.ReduceOp.MAX)
        found = int(code)  # here the host waits
        rank, early_there = divmod(found, _RANK)
        return (rank, count + 1 - early_there) if found else (None, 0)

    def _describe(self, rank: int, place: int, batches: list[tuple[int, int]], optimizer: Any) -> str:
        where = f"optimizer step {self.trainer.global_step}"
        if self.trainer.world_size > 1:
            where += f", rank {rank}"
        if place < len(batches):
            return f"the loss of batch {batches[place][1]} in epoch {batches[place][0]} is NaN or infinite ({where})"
        names = [
            clean_name(name)
            for name, p in self.module.named_parameters()
            if isinstance(p.grad, Tensor) and not bool(_local(p.grad).isfinite().all())
        ]
        what = f"gradients ({some(names)})" if names else "gradients"
        seen = sorted({batch for _, batch in batches})
        told = f"batches {seen[0]} to {seen[-1]}" if len(seen) > 1 else f"batch {seen[0]}" if seen else "this step"
        epoch = f" in epoch {batches[-1][0]}" if batches else ""
        return f"{what} of {told}{epoch} are NaN or infinite, though the loss is finite ({where})"

    def _watch(self, core: nn.Module, args: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda grad: self._passed.append(grad.isfinite().all()))


def _gradients(optimizer: Any) -> Iterator[Tensor]:
    """This rank's part of each gradient that the optimizer is going to use."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if isinstance(parameter.grad, Tensor):
                yield _local(parameter.grad)


def _local(tensor: Tensor) -> Tensor:
    local = own_part(tensor)
    return local.coalesce().values() if local.is_sparse else local
