"""What `prepare_strategy` refuses and sets before any work, without starting processes."""

from __future__ import annotations

import functools
import types
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.distributed.fsdp.wrap import ModuleWrapPolicy, size_based_auto_wrap_policy

from lightning_pmss import PMSSConfig, PMSSWrapPolicy, convert
from lightning_pmss.conversion.convert import adapted_layers
from lightning_pmss.distributed import sharding
from lightning_pmss.distributed.sharding import engine_of, prepare_strategy
from tests.callbacks.toys import Toy


def trainer(strategy: Any, inference_mode: bool = False) -> Any:
    loop = types.SimpleNamespace(inference_mode=inference_mode)
    return types.SimpleNamespace(strategy=strategy, world_size=8, validate_loop=loop)


class Meshed(ModelParallelStrategy):
    """With a mesh of the given tensor-parallel size, which the real one makes from the processes."""

    tensor_parallel = 1

    @property
    def device_mesh(self) -> Any:
        return {"tensor_parallel": types.SimpleNamespace(size=lambda: self.tensor_parallel)}


def test_tensor_parallelism_is_refused_with_the_line_to_type() -> None:
    strategy = Meshed()
    strategy.tensor_parallel = 8
    with pytest.raises(MisconfigurationException, match=r"data_parallel_size=8, tensor_parallel_size=1\)"):
        prepare_strategy(trainer(strategy), Toy())
    strategy.tensor_parallel = 1
    assert prepare_strategy(trainer(strategy), Toy()) == "fsdp2"


def test_inference_mode_is_refused_under_fsdp2() -> None:
    with pytest.raises(MisconfigurationException, match=r"Type Trainer\(inference_mode=False\)"):
        prepare_strategy(trainer(Meshed(), inference_mode=True), Toy())


@pytest.mark.parametrize(
    ("policy", "inner"),
    [(None, None), ({nn.Linear}, ModuleWrapPolicy), (ModuleWrapPolicy({nn.Linear}), ModuleWrapPolicy)],
)
def test_fsdp1_gets_our_policy_around_its_own(policy: Any, inner: Any) -> None:
    strategy = FSDPStrategy(auto_wrap_policy=policy)
    assert prepare_strategy(trainer(strategy), Toy()) == "fsdp1"
    ours = strategy.kwargs["auto_wrap_policy"]
    assert isinstance(ours, PMSSWrapPolicy)
    assert isinstance(ours.policy, inner) if inner else ours.policy is None
    prepare_strategy(trainer(strategy), Toy())
    assert strategy.kwargs["auto_wrap_policy"] is ours


def test_a_function_as_policy_is_refused() -> None:
    strategy = FSDPStrategy(auto_wrap_policy=functools.partial(size_based_auto_wrap_policy, min_num_params=10))
    with pytest.raises(MisconfigurationException, match=r"Type auto_wrap_policy=PMSSWrapPolicy\(layers="):
        prepare_strategy(trainer(strategy), Toy())


def test_engines() -> None:
    assert engine_of(SingleDeviceStrategy(torch.device("cpu"))) == "plain"
    assert engine_of(DDPStrategy()) == "plain"


def test_the_policy_makes_a_unit_of_everything_that_trains() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), nn.LayerNorm(4), nn.Linear(4, 2))
    convert(model, PMSSConfig(["0.0", "0.1"], rank=2, also_train=["2"]))
    units = PMSSWrapPolicy(layers=[])._run_policy(model, set(), {"mixed_precision": "bf16"})
    cores = [layer.core for layer in adapted_layers(model).values()]
    assert set(units) == {*cores, *(core.frame for core in cores), model[2]}
    assert all(units[core]["mixed_precision"] is None for core in cores)
    assert units[model[2]] == {"mixed_precision": "bf16"}
    assert set(PMSSWrapPolicy(layers=["LayerNorm"])._run_policy(model, set(), {})) == {*units, model[1]}
    with pytest.raises(ValueError, match=r"layers=\['Layernorm'\]\): no such module class; the model has .*LayerNorm"):
        PMSSWrapPolicy(layers=["Layernorm"])._run_policy(model, set(), {})


def test_quantised_layers_are_not_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "quantisation_of", lambda layer: "bitsandbytes nf4")
    sharding.refuse_quantised("plain", Toy())
    with pytest.raises(MisconfigurationException, match=r"bitsandbytes nf4\), which zero cannot shard.*under 'ddp'"):
        sharding.refuse_quantised("zero", Toy())
    monkeypatch.undo()
    sharding.refuse_quantised("zero", Toy())
