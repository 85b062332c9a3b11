"""Run the passes of SAM and BSAM on all batches of an optimizer step."""

from __future__ import annotations

import functools
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.apply_func import apply_to_collection
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loops.optimization.automatic import _AutomaticOptimization
from lightning.pytorch.loops.utilities import _block_parallel_sync_behavior
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from lightning_pmss.callbacks.statistics import RunningStatistics
from lightning_pmss.modules.token_weighted import TokenWeighted
from lightning_pmss.optimizers import SharpnessAware
from lightning_pmss.random_states import random_states, set_random_states


class SharpnessPasses(Callback):
    """Run the passes of `SAM` and `BSAM` with Lightning's automatic optimization. `AdapterCallback` does the same by itself.

    Lightning's closure computes the last batch of an optimizer step only. Here the batches that a step accumulates are kept on
    their device, and each further pass runs ``training_step`` and ``backward`` on all of them, with the weights and gradients
    of all processes as in the first one. Clipping, hooks and the logged loss belong to the final gradient and the first pass:
    ``on_before_backward``, ``on_after_backward`` and ``self.log`` are left out in further passes, and running statistics and
    metrics are as after the first one.

    With another optimizer the callback does nothing.

    Raises:
        MisconfigurationException: With manual optimization, precision ``16-mixed`` or DeepSpeed.

    Example:
        >>> import lightning as L
        >>> from lightning_pmss.callbacks import SharpnessPasses
        >>> trainer = L.Trainer(callbacks=[SharpnessPasses()])
    """

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            refuse_deepspeed(trainer, pl_module)

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        run_passes(trainer, pl_module)

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        forget_passes(trainer)


def refuse_deepspeed(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Let the module refuse to make such an optimizer under DeepSpeed, whose engine would fail on it; call it in ``setup``."""
    if not isinstance(trainer.strategy, DeepSpeedStrategy):
        return
    original = module.configure_optimizers

    @functools.wraps(original)
    def configure_optimizers() -> Any:
        module.__dict__.pop("configure_optimizers", None)  # it must not survive in a copy
        made = original()
        if kind := next((type(o).__name__ for o in _optimizers_in(made)), None):
            raise MisconfigurationException(
                f"{kind} is not possible under DeepSpeed, whose engine owns the gradients and the step. Use one device, 'ddp',"
                " FSDPStrategy or ModelParallelStrategy (configs/strategy/fsdp2.yaml), or another optimizer."
            )
        return made

    module.configure_optimizers = configure_optimizers  # type: ignore[method-assign]


def _optimizers_in(made: Any) -> Iterator[SharpnessAware]:
    if isinstance(made, SharpnessAware):
        yield made
    elif isinstance(made, (Mapping, list, tuple)):
        for part in made.values() if isinstance(made, Mapping) else made:
            yield from _optimizers_in(part)


def run_passes(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Prepare Lightning's loop for a `SharpnessAware` optimizer, if there is one; call it in ``on_fit_start``.

    Raises:
        MisconfigurationException: With manual optimization or a scaled loss.
    """
    forget_passes(trainer)  # of a fit that an exception ended
    optimizer = next(_optimizers_in(trainer.optimizers), None)
    if optimizer is None:
        return
    kind = type(optimizer).__name__
    if not module.automatic_optimization:
        raise MisconfigurationException(
            f"{kind} runs {optimizer.passes} passes on the batches of a step, which Lightning gives with automatic optimization"
            " only. Remove `automatic_optimization = False`."
        )
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise MisconfigurationException(
            f"{kind} is not possible with precision={trainer.precision!r}, whose scaler steps without the passes. Type"
            " precision='bf16-mixed' or '32-true'."
        )
    if isinstance(trainer.strategy, FSDPStrategy):
        # Only FSDP1 knows which of the gradients are shards. An infinite limit clips nothing.
        root: Any = trainer.strategy.model
        optimizer.gradient_norm = functools.partial(root.clip_grad_norm_, math.inf)
    optimizer.driven = True
    loop: Any = trainer.fit_loop.epoch_loop.automatic_optimization
    loop.__class__ = type(type(loop).__name__, (_Passes, type(loop)), {})
    loop.begin(module)


def forget_passes(trainer: L.Trainer) -> None:
    """Give Lightning its own loop back."""
    for optimizer in _optimizers_in(trainer.optimizers):
        optimizer.driven = False
    loop: Any = trainer.fit_loop.epoch_loop.automatic_optimization
    if isinstance(loop, _Passes):
        loop.batches.clear()
        loop.__class__ = type(loop).__mro__[2]


@dataclass
class _Batch:
    """One of the batches of an optimizer step.

    Attributes:
        arguments: Of ``training_step``, with copies of the tensors, as it may change its own.
        ready: The loop's number of the batch.
        random: Random states before its first pass.
    """

    arguments: Mapping[str, Any]
    ready: int
    random: Mapping[str, Any]


class _Passes(_AutomaticOptimization):
    """Lightning's loop, whose closure of an optimizer step runs all passes, so that what follows sees the final gradients."""

    batches: list[_Batch]

    def begin(self, module: L.LightningModule) -> None:
        self.batches = []
        self._statistics = RunningStatistics(module)

    @override
    def run(self, optimizer: Any, batch_idx: int, kwargs: OrderedDict[str, Any]) -> Any:
        if "any" in kwargs:
            raise MisconfigurationException(
                f"{type(optimizer).__name__} needs each batch in several passes, and `training_step(self, dataloader_iter)`"
                " takes them itself. Type `training_step(self, batch, batch_idx)`."
            )
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.batches.clear()
        if not self.batches:
            self._statistics.keep()  # to see what the first pass changes
        self.batches.append(_Batch(_copied(kwargs), self._progress().ready, random_states()))
        return super().run(optimizer, batch_idx, kwargs)

    @override
    def _optimizer_step(self, batch_idx: int, train_step_and_backward_closure: Callable[[], Tensor | None]) -> None:
        optimizer: Any = self.trainer.optimizers[0]

        def passes() -> Tensor | None:
            loss = train_step_and_backward_closure()
            with self._aside():
                optimizer.complete(functools.partial(self._again, optimizer))
            return loss

        super()._optimizer_step(batch_idx, passes)
        self.batches.clear()

    def _again(self, optimizer: SharpnessAware) -> None:
        """One more pass over the batches."""
        trainer = self.trainer
        for batch in self.batches:
            with _block_parallel_sync_behavior(trainer.strategy, block=batch is not self.batches[-1]):
                if optimizer.same_dropout:
                    set_random_states(batch.random)
                self._progress().ready = batch.ready
                loss = self._training_step(_copied(batch.arguments)).closure_loss
                if loss is not None:
                    trainer.precision_plugin.backward(loss, trainer.lightning_module, optimizer)

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Leave no trace of further passes: in logs, random states, running statistics, metrics and the loop's progress."""
        module, ready, states = self.trainer.lightning_module, self._progress().ready, random_states()
        optimizer: Any = self.trainer.optimizers[0]
        metrics = [(metric, _state_of(metric)) for metric in module.modules() if isinstance(metric, Metric)]
        part = module.step_part if isinstance(module, TokenWeighted) else None
        own = module.__dict__.get("log")
        self._statistics.keep()
        object.__setattr__(module, "log", _log_nothing)
        try:
            yield
        finally:
            object.__delattr__(module, "log")
            if own is not None:
                object.__setattr__(module, "log", own)
            self._progress().ready = ready
            if optimizer.same_dropout:
                set_random_states(states)
            self._statistics.give_back()
            for metric, state in metrics:
                metric.__dict__.update(state)
            if part is not None:
                module.step_part = part  # type: ignore[assignment]

    def _progress(self) -> Any:
        return self.trainer.fit_loop.epoch_loop.batch_progress.current


def _copied(arguments: Mapping[str, Any]) -> OrderedDict[str, Any]:
    return OrderedDict(apply_to_collection(dict(arguments), Tensor, torch.clone))


def _state_of(metric: Metric) -> dict[str, Any]:
    """What `Metric.update` and `Metric.forward` change."""
    counted = {name: metric.__dict__[name] for name in ("_update_count", "_computed", "_forward_cache")}
    return counted | metric._copy_state_dict()


def _log_nothing(*args: Any, **kwargs: Any) -> None:
    """In place of ``LightningModule.log``."""
