"""Rotation coordinates where tensors are kept in parts: the losses are DDP's, and a resumed run is the run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.launch import launch, ranks, require

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.mark.parametrize("name", ["fsdp1", "fsdp2", "zero2", "zero3"])
def test_losses_are_ddps(name: str, tmp_path: Path) -> None:
    require(name)
    callback = {"coordinates": "rotation", "selection": "random"}
    tasks = [
        {"folder": str(tmp_path / "ddp"), "strategy": "ddp", "steps": 6, "callback": callback},
        {"folder": str(tmp_path / name), "strategy": name, "steps": 6, "callback": callback},
    ]
    launch("tests.distributed.script", tasks)
    for own, ddp in zip(ranks(tmp_path / name), ranks(tmp_path / "ddp"), strict=True):
        assert len(own["losses"]) == 6
        assert own["losses"] == pytest.approx(ddp["losses"], rel=1e-5)
        assert own["losses"][-1] != own["losses"][0]
        assert own["frozen_gradients"] == 0
