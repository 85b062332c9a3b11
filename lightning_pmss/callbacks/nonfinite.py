"""Stop the training, or skip the optimizer step, at a NaN or infinite loss or gradient.

A single such step makes Adam's moments and all trained tensors NaN for good. All ranks decide alike, and host and device
synchronise once per optimizer step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_pmss.callbacks.statistics import RunningStatistics
from lightning_pmss.distributed.sharding import Engine
from lightning_pmss.layers.adapted import AdaptedLinear
from lightning_pmss.layers.experts import called_core
from lightning_pmss.layers.parts import clean_name, own_part
from lightning_pmss.messages import some
from lightning_pmss.optimizers import SharpnessAware

ON_NONFINITE = ("stop", "skip")
_RANK = 1 << 20  # above the number of batches in a step
_MOST = 10  # skipped steps in a row, after which the data cannot be the cause
_SMALLEST_SCALE = 2.0**-20  # of a loss scaler (2^16 at first); below it, large gradients explain no overflow


class NonFiniteError(RuntimeError):
    """NaN or infinite loss or gradient; raised on all ranks at the same step."""


class NonFiniteCheck:
    """Check each loss and, before each optimizer step, the gradients.

    The last check is in a pre-hook of ``optimizer.step``. It runs after gradient clipping and all other hooks, also in manual
    optimization.

    Args:
        action: ``stop`` or ``skip``.
        trainer: Trainer of the fit.
        module: The converted module.
        layers: Converted layers by canonical name.
        engine: Engine of the strategy.
        begin_step: Called before each step that passes the check.

    Attributes:
        skipped: Number of skipped optimizer steps.
        names_layers: Whether `GradientCheck` may raise for a gradient that is not finite, and name its layers.

    Raises:
        MisconfigurationException: ``skip`` under DeepSpeed, whose engine gives no access to the gradients.
    """

    def __init__(
        self,
        action: str,
        trainer: L.Trainer,
        module: nn.Module,
        layers: Mapping[str, AdaptedLinear],
        engine: Engine,
        begin_step: Callable[[], None] | None = None,
    ) -> None:
        if action == "skip" and engine == "zero":
            raise MisconfigurationException(
                "on_nonfinite='skip' is not possible under DeepSpeed, whose engine owns the gradients; type 'stop'."
            )
        self.action, self.trainer, self.module, self.begin_step = action, trainer, module, begin_step
        self.skipped = self._in_a_row = 0
        # Under a sharding engine gradients differ between ranks, and a rank that stops alone leaves the others waiting.
        self.names_layers = action == "stop" and engine == "plain" and trainer.precision != "16-mixed"
        self._scaled = trainer.precision == "16-mixed"  # its scaler skips steps that overflow, on purpose
        self._batches: list[tuple[int, int]] = []  # (epoch, batch) since the last optimizer step, the same on all ranks
        self._losses: list[Tensor] = []  # whether each of their losses is finite
        self._passed: list[Tensor] = []  # whether each gradient that was checked early is finite
        self._engines = engine == "zero"
        self._hooks: list[Any] = []
        self._hooked: set[int] = set()  # ids of the optimizers with a pre-hook
        if self._engines:
            self._hooks = [
                c.register_forward_hook(self._watch) for c in dict.fromkeys(map(called_core, layers.values()))
            ]
        elif not self._scaled:  # a scaler does not call the optimizer if a gradient is not finite
            for optimizer in trainer.optimizers:
                if isinstance(optimizer, torch.optim.Optimizer):
                    self._hooks.append(optimizer.register_step_pre_hook(self._within_step))
                    self._hooked.add(id(optimizer))
        self._statistics = RunningStatistics(module)

    def backward(self, loss: Tensor) -> None:
        """Record whether a loss is finite, before its backward pass."""
        loop = self.trainer.fit_loop.epoch_loop
        self._batches.append((self.trainer.current_epoch, loop.batch_idx))
        value = loss.detach()
        # The scaler's factor can make a loss infinite, but not NaN.
        self._losses.append(~value.isnan().any() if self._scaled else value.isfinite().all())

    def before_batch(self) -> None:
        """Copy the running statistics of the module before the first batch of a step."""
        if not self._losses:
            self._statistics.keep()

    def before_clipping(self, optimizer: Any) -> None:
        """Check gradients before they are clipped; for an optimizer without a pre-hook this is the last check.

        Raises:
            NonFiniteError: See `before_step`.
        """
        if id(optimizer) in self._hooked:
            self._passed += self._flags(optimizer)
        elif self._scaled and self._scale_is_gone():
            raise NonFiniteError(
                f"the gradients were NaN or infinite at every scale of the loss, down to {_SMALLEST_SCALE:.0e} (optimizer step"
                f" {self.trainer.global_step}). The training stops here; the trained tensors are intact. Check the batches"
                " and the learning rate, or use precision='bf16-mixed' or '32-true'."
            )
        else:
            self.before_step(optimizer)

    def _within_step(self, optimizer: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """Pre-hook of ``optimizer.step``: check now, or after the closure that computes the gradients."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self.before_step(optimizer)
            return None

        def looking() -> Any:
            loss = closure()
            self.before_step(optimizer)
            return loss

        return args[:1], {**kwargs, "closure": looking}

    def before_step(self, optimizer: Any) -> bool:
        """Check the losses and gradients of a step; return whether it is skipped, with its gradients set to None.

        Raises:
            NonFiniteError: A loss or gradient is not finite, and the action is ``stop`` or too many steps were skipped.
        """
        batches, losses, passed = self._batches, self._losses, self._passed
        self._batches, self._losses, self._passed = [], [], []
        rank, place = self._worst(losses, passed + self._flags(optimizer))
        if rank is None:
            self._in_a_row = 0
            if self.begin_step is not None:
                self.begin_step()
            return False
        self._statistics.give_back()
        what = self._describe(rank, place, batches, optimizer)
        if self.action == "stop":
            raise NonFiniteError(
                f"{what}. The training stops before this step, so the trained tensors are intact. Check the batch (no"
                " label that is trained on? values out of range?) and the learning rate; on_nonfinite='skip' leaves"
                " such steps out."
            )
        self.skipped, self._in_a_row = self.skipped + 1, self._in_a_row + 1
        if self._in_a_row >= _MOST:
            raise NonFiniteError(f"{what}, now in {_MOST} steps in a row: the training has diverged.")
        rank_zero_warn(f"{what}. The step is left out, the {self.skipped}. so far.", category=UserWarning)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        return True

    def close(self) -> None:
        """Remove the hooks."""
        while self._hooks:
            self._hooks.pop().remove()

    def _flags(self, optimizer: Any) -> list[Tensor]:
        """Whether the gradients and their squares, which Adam averages, are finite; [] under a scaler or DeepSpeed."""
        gradients = [] if self._scaled or self._engines else list(_gradients(optimizer))
        if not gradients:
            return []
        norm = torch.nn.utils.get_total_norm(gradients, norm_type=float("inf"))
        return [_square(norm).isfinite()]

    def _scale_is_gone(self) -> bool:
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        return scaler is not None and scaler.get_scale() < _SMALLEST_SCALE

    def _worst(self, losses: list[Tensor], passed: list[Tensor]) -> tuple[int | None, int]:
        """(a rank with a non-finite value or None, index of its first such loss or the number of losses)."""
        device, count = self.trainer.strategy.root_device, len(losses)
        fine = torch.ones((), dtype=torch.bool, device=device)
        for flag in passed:
            fine = fine & flag.to(device)
        flags = torch.stack([flag.to(device) for flag in (*losses, fine)])
        # 0 if all is finite, else larger for earlier losses; the maximum over ranks encodes a rank and its index.
        early = torch.arange(count + 1, 0, -1, device=device)
        code = torch.where(flags, 0, self.trainer.global_rank * _RANK + early).max()
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(code, op=torch.distributed.ReduceOp.MAX)
        found = int(code)  # synchronises host and device
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
            if isinstance(p.grad, Tensor) and not bool(_square(_local(p.grad)).isfinite().all())
        ]
        what = f"gradients ({some(names)})" if names else "gradients"
        if isinstance(optimizer, SharpnessAware):
            what += f" in one of the {optimizer.passes} passes of {type(optimizer).__name__}"
        # Without Lightning's backward pass no batch was recorded: it is the current one.
        batches = batches or [(self.trainer.current_epoch, self.trainer.fit_loop.epoch_loop.batch_idx)]
        seen = sorted({batch for _, batch in batches})
        span = f"batches {seen[0]} to {seen[-1]}" if len(seen) > 1 else f"batch {seen[0]}"
        epoch = f" in epoch {batches[-1][0]}"
        return f"{what} of {span}{epoch} are NaN or infinite (or above 1e19), though the loss is finite ({where})"

    def _watch(self, core: nn.Module, args: Any, output: dict[str, Tensor]) -> None:
        for value in output.values():
            if value.requires_grad:
                value.register_hook(lambda grad: self._passed.append(grad.isfinite().all()))


def _gradients(optimizer: Any) -> Iterator[Tensor]:
    """This rank's part of each gradient that the optimizer is going to use; FSDP2 gives some ranks none of a short tensor."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if isinstance(parameter.grad, Tensor) and (part := _local(parameter.grad)).numel():
                yield part


def _local(tensor: Tensor) -> Tensor:
    local = own_part(tensor)
    return local.coalesce().values() if local.is_sparse else local


def _square(tensor: Tensor) -> Tensor:
    """Square in float32; in float64 for float64."""
    return (tensor if tensor.dtype == torch.float64 else tensor.float()).square()
