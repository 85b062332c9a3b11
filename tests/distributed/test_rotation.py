"""Rotation coordinates where tensors are kept in parts: losses, results and a resumed run are those of DDP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lightning_pmss import load_adapter
from lightning_pmss.conversion.convert import adapted_layers
from tests.distributed.launch import launch, per_strategy, ranks, whole_and_resumed
from tests.distributed.script import base_model

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
NAMES = ["fsdp1", "fsdp2", "zero2", "zero3"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Strategy -> folder with the whole run and one that is resumed after four of six steps."""
    parent = tmp_path_factory.mktemp("rotation")
    callback = {"coordinates": "rotation", "selection": "random", "log_u_norm": True, "dropout": 0.3}

    def launched(name: str) -> Path:  # each in its own launch: DeepSpeed does not come after DDP in one process
        folder = parent / name
        task = {"steps": 6, "strategy": name, "callback": callback}
        tasks = whole_and_resumed(folder, task, 4)
        # As other hardware might select: the checkpoint's indices are used.
        tasks.append(tasks[1] | {"callback": callback | {"seed": 5}, "folder": str(folder / "moved")})
        launch("tests.distributed.script", tasks)
        return folder

    return per_strategy(launched)


@pytest.mark.parametrize("name", NAMES)
def test_losses_and_norms_are_ddps(runs: Any, name: str) -> None:
    for own, ddp in zip(ranks(runs(name) / "whole"), ranks(runs("ddp") / "whole"), strict=True):
        assert len(own["losses"]) == 6
        assert own["losses"] == pytest.approx(ddp["losses"], rel=1e-5)
        assert own["losses"][-1] != own["losses"][0]
        assert own["frozen_gradients"] == 0
        assert len(own["norms"]) == 6
        assert own["norms"] == pytest.approx(ddp["norms"], rel=1e-4)
        assert min(own["norms"].values()) > 0


@pytest.mark.parametrize("name", ["ddp", *NAMES])
def test_resume_equals_never_stopped(runs: Any, name: str) -> None:
    for whole, resumed in zip(ranks(runs(name) / "whole"), ranks(runs(name) / "resumed"), strict=True):
        assert resumed["losses"] == whole["losses"][4:]  # to the last bit
        assert resumed["updates"] == whole["updates"]


@pytest.mark.parametrize("name", ["ddp", *NAMES])
def test_a_resumed_run_that_selected_otherwise_follows_the_checkpoint(runs: Any, name: str) -> None:
    for whole, moved in zip(ranks(runs(name) / "whole"), ranks(runs(name) / "moved"), strict=True):
        assert moved["indices"] == whole["indices"]
        assert moved["losses"] == whole["losses"][4:]
        assert moved["updates"] == whole["updates"]


@pytest.mark.parametrize("name", NAMES)
def test_adapter_and_merged_model_are_ddps(runs: Any, name: str) -> None:
    for file in ("adapter/adapter_model.safetensors", "merged/model.safetensors"):
        found, expected = (load_file(runs(which) / "whole" / "out" / file) for which in (name, "ddp"))
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-5)
    model = torch.nn.Module()
    model.net = base_model()
    load_adapter(model, runs(name) / "whole" / "out" / "adapter")  # refuses what is no rotation of the base
    for layer, module in adapted_layers(model).items():
        update = torch.tensor(ranks(runs(name) / "whole")[0]["updates"][layer])
        assert update.norm() > 1e-3
        torch.testing.assert_close(module.core_update().detach(), update, rtol=1e-3, atol=1e-5)
