"""Every method where tensors are kept in parts: losses and results are DDP's, and a resumed run is the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.launch import launch, per_strategy, ranks, whole_and_resumed
from tests.methods.cases import CASES

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
NAMES = ["fsdp1", "fsdp2", "zero2", "zero3"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Strategy -> folder with, for each method, the whole run and one that is resumed after four of six steps."""
    parent = tmp_path_factory.mktemp("methods")

    def launched(name: str) -> Path:
        tasks = []
        for method in CASES:
            folder = parent / name / method
            task = {"steps": 6, "strategy": name, "method": method}
            tasks += whole_and_resumed(folder, task, 4)
        launch("tests.distributed.script", tasks, timeout=60 * len(tasks))
        return parent / name

    return per_strategy(launched)


@pytest.mark.parametrize("method", list(CASES))
@pytest.mark.parametrize("name", NAMES)
def test_losses_updates_and_files_are_ddps(runs: Any, name: str, method: str) -> None:
    own, ddp = (runs(which) / method / "whole" for which in (name, "ddp"))
    for found, expected in zip(ranks(own), ranks(ddp), strict=True):
        assert len(found["losses"]) == 6
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert found["losses"][-1] != found["losses"][0]
        assert found["frozen_gradients"] == 0
    for file in ("adapter/adapter_model.safetensors", "merged/model.safetensors"):
        found, expected = (load_file(folder / "out" / file) for folder in (own, ddp))
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", list(CASES))
@pytest.mark.parametrize("name", ["ddp", *NAMES])
def test_resume_equals_never_stopped(runs: Any, name: str, method: str) -> None:
    folder = runs(name) / method
    for whole, resumed in zip(ranks(folder / "whole"), ranks(folder / "resumed"), strict=True):
        assert resumed["losses"] == whole["losses"][4:]  # to the last bit
        assert resumed["updates"] == whole["updates"]
