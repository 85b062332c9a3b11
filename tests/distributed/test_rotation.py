"""Rotation coordinates where tensors are kept in parts: the losses are DDP's, and a resumed run is the run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.launch import launch, ranks, require

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.mark.parametrize("name", ["fsdp1", "fsdp2", "zero2", "zero3"])
def test_losses_are_ddps(name: str, tmp_path: Path) -> None:
    require(name)
    task = {"steps": 6, "callback": {"coordinates": "rotation", "selection": "random"}}
    for strategy in ("ddp", name):  # DeepSpeed does not come after DDP in one process
        launch("tests.distributed.script", [task | {"folder": str(tmp_path / strategy), "strategy": strategy}])
    for own, ddp in zip(ranks(tmp_path / name), ranks(tmp_path / "ddp"), strict=True):
        assert len(own["losses"]) == 6
        assert own["losses"] == pytest.approx(ddp["losses"], rel=1e-5)
        assert own["losses"][-1] != own["losses"][0]
        assert own["frozen_gradients"] == 0
