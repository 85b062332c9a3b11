"""Support for Lightning's weight averaging: only trained tensors are averaged, never the frozen weights.

``WeightAveraging`` (also ``EMAWeightAveraging``) and ``StochasticWeightAveraging`` copy the whole module in ``setup``, average
every parameter, which rounds frozen ones, and store the copy in checkpoints. A `TrainedCopy` replaces that copy. It owns the
trained tensors and refers to the module's frozen ones, which swapping and copying therefore leave unchanged.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_pmss.checkpoints.module_states import holding
from lightning_pmss.conversion.convert import adapted_layers
from lightning_pmss.distributed.sharding import Engine
from lightning_pmss.layers.expert_layer import holder
from lightning_pmss.layers.indices import index_tensors
from lightning_pmss.layers.merged_layer import Mergeable
from lightning_pmss.layers.parts import clean_name, clean_state
from lightning_pmss.messages import some


class TrainedCopy(nn.Module):
    """Replacement for an averaging callback's deep copy of the module.

    ``parameters()`` and ``buffers()`` have the module's order and length, and its own frozen parameters; ``alone`` limits
    them to averaged tensors. The state dict contains trained parameters, buffers and indices.
    """

    of: nn.Module
    alone: bool = False

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.__dict__["of"] = module  # an assignment would register it as a child
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                self._parameters[clean_name(name)] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
        stored = clean_state(module)
        for name, buffer in ((clean_name(n), b) for n, b in module.named_buffers()):
            self._buffers[name] = buffer.detach().clone()
            if name not in stored:
                self._non_persistent_buffers_set.add(name)

    def __deepcopy__(self, memo: Any) -> TrainedCopy:
        return self  # `AveragedModel` copies its argument, which was made for it

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The averages and, unless ``alone``, the module's own frozen parameters."""
        for name, parameter in self.of.named_parameters():
            if (own := self._parameters.get(clean_name(name))) is not None:
                yield own
            elif not self.alone:
                yield parameter

    def buffers(self, recurse: bool = True) -> Iterator[Tensor]:
        """Copies of the module's buffers or, if ``alone``, the averages among them."""
        for name, buffer in self.of.named_buffers():
            own = self._buffers.get(clean_name(name))
            if not self.alone or self.has_mean(buffer):
                yield buffer if own is None else own

    def has_mean(self, buffer: Tensor) -> bool:
        """Whether a buffer can be averaged, which integers cannot."""
        return buffer.is_floating_point()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for key, indices in index_tensors(self.of).items():
            destination[f"{prefix}{key}"] = indices

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing: Any,
        unexpected: Any,
        errors: Any,
    ) -> None:
        cleaned = {clean_name(key): value for key, value in state_dict.items()}
        super()._load_from_state_dict(cleaned, prefix, local_metadata, strict, missing, unexpected, errors)
        # torch expects children for names with dots, and the indices belong to the module.
        unexpected[:] = [key for key in unexpected if not key.startswith(prefix)]


class _Trained:
    """The averaged tensors of a module, as `AveragedModel.update_parameters` reads them."""

    def __init__(self, copy: TrainedCopy) -> None:
        self.copy = copy

    def parameters(self) -> Iterator[nn.Parameter]:
        return (p for name, p in self.copy.of.named_parameters() if clean_name(name) in self.copy._parameters)

    def buffers(self) -> Iterator[Tensor]:
        return (buffer for buffer in self.copy.of.buffers() if self.copy.has_mean(buffer))


class TrainedAverage(AveragedModel):
    """Average of a module's trained tensors, with the settings of the `AveragedModel` that it replaces.

    Attributes:
        exchanged: Whether module and average hold each other's values, as in a validation; None during the exchange.
    """

    exchanged: bool | None = False

    def __init__(self, module: nn.Module, settings: AveragedModel) -> None:
        super().__init__(
            TrainedCopy(module),
            device=settings.n_averaged.device,
            avg_fn=settings.avg_fn,
            multi_avg_fn=settings.multi_avg_fn,
            use_buffers=settings.use_buffers,
        )

    def update_parameters(self, model: nn.Module) -> None:
        """Add the module's current values to the average."""
        copy: Any = self.module
        present = {clean_name(name): buffer for name, buffer in model.named_buffers()}
        averaged = {name: own for name, own in copy._buffers.items() if copy.has_mean(present[name])}
        before = {name: own.clone() for name, own in averaged.items()}
        copy.alone = True  # averaging a frozen tensor with itself would round it
        try:
            super().update_parameters(_Trained(copy))  # type: ignore[arg-type]
        finally:
            copy.alone = False
        with torch.no_grad():
            for name, own in copy._buffers.items():
                same = before[name] == present[name] if name in before else None
                # Averaging would also round a constant, and turn infinities into NaN.
                own.copy_(present[name] if same is None else torch.where(same, present[name], own))


def average_the_trained(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Replace the copies of the whole module that averaging callbacks made in ``setup``.

    Call it after all setups and ``configure_model``, before a checkpoint is loaded.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        held: Any = getattr(callback, "_average_model", None)
        if isinstance(callback, WeightAveraging):
            if held is not None and not isinstance(held, TrainedAverage):
                callback._average_model = TrainedAverage(module, held)
                exchange = functools.partial(_exchange, callback)
                callback._swap_models = exchange  # type: ignore[method-assign]
        elif isinstance(callback, StochasticWeightAveraging) and held is not None and not isinstance(held, TrainedCopy):
            callback._average_model = TrainedCopy(module)  # type: ignore[assignment]
            callback._avg_fn = functools.partial(_mean, callback._avg_fn)


def _exchange(callback: Any, module: L.LightningModule) -> None:
    """Exchange the values of module and average as the callback's class does, and record that."""
    held = callback._average_model
    after = not held.exchanged
    held.exchanged = None
    type(callback)._swap_models(callback, module)
    held.exchanged = after


def end_exchange(trainer: L.Trainer, module: L.LightningModule) -> bool:
    """Give module and average their own values back if an exception left a validation, where they are exchanged.

    Returns:
        Whether each has its own values; they are mixed if the exception came in the middle of an exchange.
    """
    for callback, held in _averages(trainer):
        if held.exchanged:
            callback._swap_models(module)
    return all(held.exchanged is not None for _, held in _averages(trainer))


def average_last_step(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Update averages by a completed optimizer step whose ``on_train_batch_end`` an exception kept from them."""
    for callback, held in _averages(trainer):
        step = trainer.global_step
        if step > callback._latest_update_step and callback.should_update(step_idx=step - 1):
            held.update_parameters(module)
            callback._latest_update_step = step


def set_last_averages(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Set the module to its averages as at the end of a training, where Lightning skipped ``on_train_end``.

    Call it in a resumed fit that had nothing left to train.
    """
    progress: Any = trainer.fit_loop.epoch_progress.current
    completed = progress.completed
    # A checkpoint of the last step does not count its epoch as completed; `StochasticWeightAveraging` asks for that.
    progress.completed = progress.started
    try:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            averages = isinstance(callback, (WeightAveraging, StochasticWeightAveraging))
            if averages and not _is_past_average(callback, progress.completed):
                callback.on_train_end(trainer, module)
    finally:
        progress.completed = completed


def _is_past_average(callback: L.Callback, epochs: int) -> bool:
    """Whether `StochasticWeightAveraging` did its epoch for BatchNorm, whose start sets the module to the average."""
    return (
        isinstance(callback, StochasticWeightAveraging)
        and bool(callback._model_contains_batch_norm)
        and epochs - 1 == callback.swa_end + 1
    )


@contextmanager
def average_in_place(trainer: L.Trainer, module: L.LightningModule) -> Iterator[None]:
    """Set the module to the average that checkpoints contain as ``state_dict``, inside the ``with`` block.

    Without `WeightAveraging` the module stays as it is, also beside `StochasticWeightAveraging`.
    """
    with ExitStack() as stack:
        for _, held in _averages(trainer):
            stack.enter_context(holding(module, clean_state(held.module)))
        yield


def _averages(trainer: L.Trainer) -> list[tuple[Any, TrainedAverage]]:
    found = [c for c in trainer.callbacks if isinstance(c, WeightAveraging)]  # type: ignore[attr-defined]
    return [(c, c._average_model) for c in found if isinstance(c._average_model, TrainedAverage)]


def _mean(mean: Any, average: Tensor, current: Tensor, count: Tensor) -> Tensor:
    """Average two tensors by ``mean``; return a frozen tensor, which is passed as both, unchanged."""
    same = average.data_ptr() == current.data_ptr()
    return average if same else mean(average, current, count)


def refuse_averages(trainer: L.Trainer, engine: Engine) -> None:
    """Refuse averaging callbacks where the strategy shards the model.

    Raises:
        MisconfigurationException: The Trainer has such a callback.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if engine != "plain" and isinstance(callback, (WeightAveraging, StochasticWeightAveraging)):
            raise MisconfigurationException(
                f"`{type(callback).__name__}` copies whole models and cannot average one that"
                f" `{type(trainer.strategy).__name__}` shards. Train on one device or under 'ddp', or remove the callback."
            )


def refuse_copies(module: L.LightningModule) -> None:
    """Refuse copies of converted layers inside the module, such as a teacher or an average.

    Raises:
        MisconfigurationException: The module has such copies; the message names them.
    """
    averaged = {id(x) for m in module.modules() if isinstance(m, AveragedModel) for x in m.modules()}
    own = {id(holder(layer)) for layer in adapted_layers(module).values()} - averaged
    if copies := [clean_name(n) for n, m in module.named_modules() if isinstance(m, Mergeable) and id(m) not in own]:
        raise MisconfigurationException(
            f"{some(copies)} are converted layers in a copy of the model that is part of the module: an average or a teacher."
            " Adapter and checkpoints contain one model and would mix the two. To average the trained tensors, add the callback"
            " `lightning.pytorch.callbacks.EMAWeightAveraging` to the Trainer. Make a copy for another purpose after the"
            " conversion (in `on_fit_start`), and do not register it as a child: `self.__dict__['teacher'] = deepcopy(...)`."
        )
