"""Load the result of a training in launched processes in the process that called ``fit``.

``ddp_spawn``, ``ddp_fork`` and ``ddp_notebook`` (Lightning's choice in a notebook with several GPUs) train a copy of the module
in other processes and send its state dict back. The module of the calling process is not converted, so Lightning's non-strict
loading would silently leave it unchanged.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import lightning as L
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.trainer.call import _call_callback_hooks, _call_configure_model
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_pmss.conversion.convert import conversion_of, convert
from lightning_pmss.conversion.matrices import modules_for
from lightning_pmss.conversion.report import ConversionReport
from lightning_pmss.conversion.roots import choose_root
from lightning_pmss.layers.adapted import frozen_key, trained_key
from lightning_pmss.layers.convertible import canonical_shape, is_linear
from lightning_pmss.layers.experts import without_stacks
from lightning_pmss.layers.matrix_layer import OwnedLinear, holder
from lightning_pmss.layers.parts import clean_name
from lightning_pmss.methods import method_of
from lightning_pmss.methods.config import AdapterConfig
from lightning_pmss.methods.given import Given, GivenLayer
from lightning_pmss.methods.method import Kind, Method

_RECOVER = "_recover_results_in_main_process"


@runtime_checkable
class TakesResults(Protocol):
    """A callback that prepares the module for the state dict of a training in launched processes."""

    def before_results(self, trainer: L.Trainer, state: Mapping[str, Any]) -> None: ...


def catch_in_launched(trainer: L.Trainer) -> None:
    """Call ``on_exception`` in launched processes, too; Lightning calls it in the launching process alone."""
    if not isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        return
    inner = trainer._run_stage

    def run_stage() -> Any:
        trainer._run_stage = inner  # type: ignore[method-assign]
        try:
            return inner()
        except BaseException as error:
            _call_callback_hooks(trainer, "on_exception", error)
            raise

    trainer._run_stage = run_stage  # type: ignore[method-assign]


def _no_checkpoint(*args: Any, **kwargs: Any) -> None:
    raise MisconfigurationException(
        "This process launched the training and has the trained tensors, but neither steps nor optimizer states, so it cannot"
        " make a checkpoint. Add ModelCheckpoint to the Trainer, which writes them where the training runs; for the trained"
        " tensors alone type `save_adapter(module, folder)`."
    )


def follow_launchers() -> None:
    """Call `TakesResults.before_results` of callbacks before Lightning loads the result of launched processes.

    No hook of a callback runs in the launching process, and the launcher is made before the first hook. So this patches the
    method of Lightning's class, once; a Trainer without such a callback behaves as before.

    Raises:
        AttributeError: This version of Lightning has no such method.
    """
    inner: Callable[..., None] = getattr(_MultiProcessingLauncher, _RECOVER)
    if hasattr(inner, "__wrapped__"):
        return

    @functools.wraps(inner)
    def recover(launcher: Any, worker_output: Any, trainer: L.Trainer) -> None:
        if worker_output.weights_path is not None:
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, TakesResults):
                    state = launcher._strategy.checkpoint_io.load_checkpoint(worker_output.weights_path)
                    callback.before_results(trainer, state)
        inner(launcher, worker_output, trainer)

    setattr(_MultiProcessingLauncher, _RECOVER, recover)


def convert_like(trainer: L.Trainer, state: Mapping[str, Tensor], config: AdapterConfig) -> ConversionReport:
    """Build and convert the Trainer's module so that a state dict of the converted module fits it.

    Args:
        trainer: Trainer of the launching process.
        state: State dict of the trained module.
        config: Config of its conversion.
    """
    module = trainer.lightning_module
    if (report := conversion_of(module)) is None:
        module.trainer = trainer
        _call_configure_model(trainer)  # as in the other processes; does nothing if the layers exist
        report = conversion_of(module)  # `model_built` may have converted them
    if report is None:
        module.load_state_dict(state, strict=False)
        named = {id(m): f"{clean_name(name)}.".lstrip(".") for name, m in module.named_modules()}
        clean = without_stacks({clean_name(key): value for key, value in state.items()})
        root = choose_root(module, config.root)
        layers = {}
        for name, layer in modules_for(module, config, root).items():
            prefix = named[id(holder(layer))] + (f"{layer.own_name}." if isinstance(layer, OwnedLinear) else "")
            if is_linear(layer) and (found := _stored(clean, prefix, method_of(config), canonical_shape(layer))):
                layers[name] = found
        report = convert(module, config, given=Given(layers, "the result of `fit`", complete=True))
    module.strict_loading = False
    trainer.save_checkpoint = _no_checkpoint  # type: ignore[method-assign]
    return report


def _stored(state: Mapping[str, Tensor], prefix: str, method: Method[Any], shape: tuple[int, int]) -> GivenLayer | None:
    """Frozen and index tensors of a layer in a state dict of the converted module; None if it was not converted."""
    kinds = {name: spec.kind for name, spec in method.specs(shape, 1).items()}
    if not any(f"{prefix}{trained_key(name)}" in state for name, kind in kinds.items() if kind is Kind.TRAINED):
        return None
    keys = {n: n if kind is Kind.INDEX else frozen_key(n) for n, kind in kinds.items() if kind is not Kind.TRAINED}
    return GivenLayer({name: state[f"{prefix}{key}"] for name, key in keys.items()})
