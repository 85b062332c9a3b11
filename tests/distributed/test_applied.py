"""Convolutions and embeddings where tensors are kept in parts: losses and results are DDP's, and a resumed run is the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.launch import launch, per_strategy, ranks, whole_and_resumed

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
NAMES = ["fsdp1", "fsdp2", "zero2", "zero3"]
METHODS = ["pmss", "pmss columns=all", "lora", "miss", "hira", "bat"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Strategy -> folder with, for each method, the whole run and one that is resumed after four of six steps."""
    parent = tmp_path_factory.mktemp("applied")

    def launched(name: str) -> Path:
        tasks = []
        for method in METHODS:
            folder = parent / name / method
            targets = ["mix", "up"] if method == "bat" else ["embed", "mix", "up"]
            kind, _, options = method.partition(" ")
            more = dict([options.split("=")]) if options else {}
            task = {"steps": 6, "strategy": name, "method": kind, "mixing": True, "lr": 0.005}
            task |= {"callback": {"target_modules": targets, **more}}
            tasks += whole_and_resumed(folder, task, 4)
        launch("tests.distributed.script", tasks, timeout=60 * len(tasks))
        return parent / name

    return per_strategy(launched)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_losses_and_files_are_ddps_and_a_resumed_run_is_the_run(runs: Any, name: str, method: str) -> None:
    own, ddp = (runs(which) / method for which in (name, "ddp"))
    for found, expected, again in zip(ranks(own / "whole"), ranks(ddp / "whole"), ranks(own / "resumed"), strict=True):
        assert len(found["losses"]) == 6
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4)
        assert found["losses"][-1] != found["losses"][0]
        assert found["frozen_gradients"] == 0
        assert again["losses"] == found["losses"][4:]
    for file in ("adapter/adapter_model.safetensors", "merged/model.safetensors"):
        found, expected = (load_file(folder / "whole" / "out" / file) for folder in (own, ddp))
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-4)
