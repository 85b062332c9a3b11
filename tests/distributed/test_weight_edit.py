"""The weight edit where weights are kept in parts: inside a layer's forward and backward W is whole, so nothing changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed.launch import launch, ranks, require

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.mark.parametrize("name", ["ddp", "fsdp1", "fsdp2", "zero3"])
def test_losses_are_those_of_the_thin_edit(name: str, tmp_path: Path) -> None:
    require(name)
    task = {"strategy": name, "steps": 6, "lr": 0.005}  # at 0.02 U grows until the weight edit refuses the sixth step
    tasks = [task | {"folder": str(tmp_path / edit), "callback": {"edit": edit}} for edit in ("weight", "auto")]
    launch("tests.distributed.script", tasks)
    for weight, thin in zip(ranks(tmp_path / "weight"), ranks(tmp_path / "auto"), strict=True):
        assert len(weight["losses"]) == 6
        assert weight["losses"] == pytest.approx(thin["losses"], rel=1e-4)
        assert weight["losses"][-1] != weight["losses"][0]
        assert weight["frozen_gradients"] == 0
        for layer, update in thin["updates"].items():
            assert torch.tensor(update).norm() > 1e-3
            torch.testing.assert_close(
                torch.tensor(weight["updates"][layer]), torch.tensor(update), rtol=1e-2, atol=1e-4
            )
