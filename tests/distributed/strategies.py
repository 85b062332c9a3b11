"""Lightning's strategies on CPU and gloo: FSDP1 and DeepSpeed are refused there, so thin subclasses lift just that.

DeepSpeed builds a C++ operation when it is first used, hence the compiler.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from lightning.fabric.strategies.fsdp import _get_sharded_state_dict_context
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
)
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.fsdp import FullOptimStateDictConfig, FullStateDictConfig, OptimStateKeyType, StateDictType
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

NAMES = ("ddp", "fsdp1", "fsdp1-full", "fsdp2", "fsdp2-full", "zero2", "zero3")


class CPUFSDP(FSDPStrategy):
    """FSDP1 on the CPU, where the full state must not be "offloaded": that crashes the process."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        return FSDP(
            model,
            device_id=torch.device("cpu"),
            mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy,
            **self.kwargs,
        )

    def _context(self) -> Any:
        assert self.model is not None
        if self._state_dict_type == "sharded":
            return _get_sharded_state_dict_context(self.model)
        return FSDP.state_dict_type(
            self.model,
            StateDictType.FULL_STATE_DICT,
            FullStateDictConfig(offload_to_cpu=False),
            FullOptimStateDictConfig(offload_to_cpu=False),
        )

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.model is not None
        with self._context():
            return self.model.state_dict()

    def optimizer_state(self, optimizer: Any) -> dict[str, Tensor]:
        assert self.model is not None
        plain = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        with self._context():
            state = FSDP.optim_state_dict(self.model, plain)
            if self._state_dict_type == "full":
                state = FSDP.rekey_optim_state_dict(state, OptimStateKeyType.PARAM_ID, self.model)
            return state


class CPUDeepSpeed(DeepSpeedStrategy):
    """DeepSpeed on the CPU."""

    def setup_environment(self) -> None:
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def _initialize(self, model: nn.Module, config: Any, **options: Any) -> Any:
        import deepspeed

        place = argparse.Namespace(device_rank=self.local_rank)
        return deepspeed.initialize(args=place, config=config, model=model, dist_init_required=False, **options)

    def _setup_model_and_optimizer(self, model: nn.Module, optimizer: Any, lr_scheduler: Any = None) -> Any:
        trained = [p for p in model.parameters() if p.requires_grad]
        engine, wrapped, _, _ = self._initialize(
            model, self.config, model_parameters=trained, optimizer=optimizer, lr_scheduler=lr_scheduler
        )
        return engine, wrapped

    def _initialize_deepspeed_inference(self, model: nn.Module) -> None:
        from lightning.pytorch.strategies.deepspeed import remove_module_hooks

        assert isinstance(self.config, dict)
        config: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1}
        if self.zero_stage_3:
            config |= {k: self.config[k] for k in ("zero_allow_untested_optimizer", "zero_optimization")}
        remove_module_hooks(model)
        engine, _, _, _ = self._initialize(model, config, model_parameters=[])
        self.model = engine

    def setup(self, trainer: Any) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            assert isinstance(self.config, dict)
        super().setup(trainer)


def make_strategy(name: str, **options: Any) -> Strategy:
    """A strategy for two processes on the CPU by the name in `NAMES`."""
    kind, _, full = name.partition("-")
    if kind == "ddp":
        return DDPStrategy(**options)
    if kind == "fsdp1":
        return CPUFSDP(state_dict_type="full" if full else "sharded", **options)
    if kind == "fsdp2":
        sizes = {"data_parallel_size": 2, "tensor_parallel_size": 1} | options
        return ModelParallelStrategy(**sizes, save_distributed_checkpoint=not full)
    stage = int(kind.removeprefix("zero"))
    strategy = CPUDeepSpeed(stage=stage, **options)
    assert isinstance(strategy.config, dict)
    zero = strategy.config["zero_optimization"]
    zero["memory_efficient_linear"] = False
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0  # else small parameters stay whole and nothing is tested
    return strategy
