"""Prepare Lightning's strategies for an adapted model; refuse unsupported combinations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import lightning as L
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn
from torch.distributed.fsdp.wrap import CustomPolicy, _Policy

from lightning_pmss.layers.adapter import Adapter, FrozenTensors
from lightning_pmss.layers.matrices import AdaptedMatrices
from lightning_pmss.layers.parts import clean_name, is_fsdp1
from lightning_pmss.layers.quantised import quantisation_of

Engine = Literal["plain", "fsdp1", "fsdp2", "zero"]


class PMSSWrapPolicy(CustomPolicy):
    """FSDP1's ``auto_wrap_policy`` for a converted model: every trained tensor is a unit of its own.

    FSDP1 flattens each unit into one tensor. Frozen and trained parameters in one unit would make the frozen ones require
    gradients: a weight gradient for every frozen layer, sharded but as large as the model, and the inputs kept for it. So
    the decoder blocks are units, and inside them each `Adapter`, its frozen tensors and each module of ``also_train``. Adapters
    keep float32 also under ``bf16-mixed``.

    Args:
        layers: Class names of the blocks to shard as units, such as ``[LlamaDecoderLayer]``; by default those that the
            Hugging Face model says must not be split (``_no_split_modules``).
        policy: Another policy to ask for the blocks instead (an instance such as ``ModuleWrapPolicy``).

    Example::

        strategy:
          class_path: lightning.pytorch.strategies.FSDPStrategy
          init_args:
            auto_wrap_policy: {class_path: lightning_pmss.PMSSWrapPolicy, init_args: {layers: [LlamaDecoderLayer]}}

    """

    def __init__(self, layers: Sequence[str] | None = None, policy: _Policy | None = None) -> None:
        super().__init__(lambda module: False)
        self.layers = None if layers is None else list(layers)
        self.policy = policy

    def __call__(self, module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
        """Never called: it makes the class one of the types that FSDPStrategy's argument has, so that YAML may name it."""
        raise NotImplementedError("FSDP asks a policy object by `_run_policy`.")

    def _run_policy(
        self, root_module: nn.Module, ignored_modules: set[nn.Module], root_kwargs: dict[str, Any]
    ) -> dict[nn.Module, dict[str, Any]]:
        if self.policy is not None:
            units = self.policy._run_policy(root_module, ignored_modules, root_kwargs)
        else:
            names = set(_unsplit(root_module) if self.layers is None else self.layers)
            blocks = [m for m in root_module.modules() if type(m).__name__ in names and m not in ignored_modules]
            if lost := names - {type(m).__name__ for m in blocks}:
                kinds = sorted({type(m).__name__ for m in root_module.modules()})
                raise ValueError(
                    f"PMSSWrapPolicy(layers={sorted(lost)}): no such module class; the model has {', '.join(kinds)}."
                )
            units = {m: dict(root_kwargs) for m in blocks}
        for module in root_module.modules():
            if module is root_module or module in ignored_modules:
                continue
            if isinstance(module, (Adapter, FrozenTensors)):
                units[module] = root_kwargs | {"mixed_precision": None}
            elif any(p.requires_grad for p in module.parameters(recurse=False)):
                units[module] = dict(root_kwargs)
        return units


def engine_of(strategy: Strategy) -> Engine:
    """Which engine a strategy uses, as far as conversion and checkpoints are concerned.

    Raises:
        MisconfigurationException: The strategy is not supported.
    """
    if isinstance(strategy, DeepSpeedStrategy):  # before DDP, from which it is derived
        return "zero"
    if isinstance(strategy, FSDPStrategy):
        return "fsdp1"
    if isinstance(strategy, ModelParallelStrategy):
        return "fsdp2"
    if isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
        return "plain"
    raise MisconfigurationException(
        f"PMSSCallback does not support `{type(strategy).__name__}`; use one device, 'ddp', FSDPStrategy,"
        " ModelParallelStrategy (FSDP2) or DeepSpeedStrategy."
    )


def prepare_strategy(trainer: L.Trainer, module: L.LightningModule) -> Engine:
    """Refuse what cannot work, before any work, and set what the engine needs; called in ``Callback.setup``.

    Raises:
        MisconfigurationException: With the remedy.
    """
    strategy = trainer.strategy
    engine = engine_of(strategy)
    if engine == "fsdp2":
        _prepare_fsdp2(trainer, strategy)
    elif engine == "fsdp1":
        _prepare_fsdp1(strategy, module)
    elif engine == "zero":
        assert isinstance(strategy, DeepSpeedStrategy)
        if not strategy.exclude_frozen_parameters:
            rank_zero_info("DeepSpeedStrategy(exclude_frozen_parameters=True) set: checkpoints without the base.")
        strategy.exclude_frozen_parameters = True
    return engine


def refuse_quantised(engine: Engine, module: nn.Module) -> None:
    """Refuse to shard quantised weights: engines split rows of floats, not packed codes.

    Raises:
        MisconfigurationException: A layer is quantised and the strategy shards.
    """
    found = [
        (clean_name(n), kind)
        for n, m in module.named_modules()
        if isinstance(m, nn.Linear) and (kind := quantisation_of(m))
    ]
    if engine != "plain" and found:
        raise MisconfigurationException(
            f"`{found[0][0]}` and {len(found) - 1} more layers are quantised ({found[0][1]}), which {engine} cannot shard."
            " Train on one device or under 'ddp', or load the model unquantised."
        )


def refuse_untried(engine: Engine, module: nn.Module) -> None:
    """Refuse to shard converted layers that have not been tried with engines that keep tensors in parts.

    Raises:
        MisconfigurationException: Parameters of other modules are converted and the strategy shards.
    """
    if engine == "plain":
        return
    for name, found in module.named_modules():
        if isinstance(found, AdaptedMatrices):
            raise MisconfigurationException(
                f"`{clean_name(name)}` has adapters on its own parameters (target_parameters), which {engine} cannot shard."
                " Train on one device or under 'ddp', or take them out of target_parameters."
            )


def _prepare_fsdp2(trainer: L.Trainer, strategy: Strategy) -> None:
    assert isinstance(strategy, ModelParallelStrategy)
    tensor_parallel = strategy.device_mesh["tensor_parallel"].size()
    if tensor_parallel > 1:
        raise MisconfigurationException(
            f"tensor_parallel_size={tensor_parallel} ('auto' means all devices of a node) would split the rows and columns"
            " that the adapter reads. Type ModelParallelStrategy("
            f"data_parallel_size={trainer.world_size}, tensor_parallel_size=1)."
        )
    if trainer.validate_loop.inference_mode:  # the Trainer's argument; the loop inside `fit` never uses it
        raise MisconfigurationException(
            "FSDP2's parameters cannot be trained any more once a forward pass has run under torch.inference_mode, which"
            " Lightning uses by default in `validate`, `test` and `predict`. Type Trainer(inference_mode=False)."
        )


def _prepare_fsdp1(strategy: Strategy, module: L.LightningModule) -> None:
    assert isinstance(strategy, FSDPStrategy)
    if is_fsdp1(module):
        raise MisconfigurationException(
            "This module was wrapped by FSDP in an earlier Trainer call, and Lightning cannot wrap it again. Evaluate inside"
            " `fit` (validation), or build a fresh module (in a new process) and load the checkpoint or the adapter."
        )
    policy = strategy.kwargs.get("auto_wrap_policy")
    if isinstance(policy, PMSSWrapPolicy):
        return
    if policy is not None and not isinstance(policy, _Policy):
        raise MisconfigurationException(
            f"auto_wrap_policy={policy!r} would put frozen and trained parameters into one FSDP unit, so that the frozen ones"
            " get gradients. Type auto_wrap_policy=PMSSWrapPolicy(layers=['<class name of the blocks>'])."
        )
    strategy.kwargs["auto_wrap_policy"] = PMSSWrapPolicy(policy=policy)
    rank_zero_info(
        "PMSS: FSDP's auto_wrap_policy extended by PMSSWrapPolicy, so that every trained tensor is its own unit."
    )


def _unsplit(model: nn.Module) -> list[str]:
    """Class names of the blocks that the Hugging Face models inside say must not be split."""
    declared: set[str] = set()
    for module in model.modules():
        declared |= set(getattr(module, "_no_split_modules", None) or ())
    present = {type(m).__name__ for m in model.modules()}
    return sorted(declared & present)
