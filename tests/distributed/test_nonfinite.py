"""A loss that is NaN on one rank: all ranks stop, or leave the step out, together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed.launch import launch, ranks, require

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.mark.parametrize("name", ["ddp", "fsdp1", "fsdp2", "zero2", "zero3"])
def test_one_rank_with_nan(name: str, tmp_path: Path) -> None:
    require(name)
    stop = {
        "folder": str(tmp_path / "stop"),
        "poison": 3,
        "raises": "the loss of batch 3 in epoch 0 is NaN or infinite (optimizer step 3, rank 1)",
    }
    skip = {"folder": str(tmp_path / "skip"), "poison": 3, "callback": {"on_nonfinite": "skip"}, "steps": 6}
    if name.startswith("zero"):
        skip["raises"] = "on_nonfinite='skip' is not possible under DeepSpeed"
    first = {"folder": str(tmp_path / "three"), "steps": 3}
    launch("tests.distributed.script", [task | {"strategy": name} for task in (stop, skip, first)])
    saved = {path.name for path in (tmp_path / "stop" / "saved").iterdir()}
    assert {"step=2.ckpt", "last-interrupted.ckpt"} <= saved  # the ranks came to the end together
    assert (tmp_path / "stop" / "out" / "adapter" / "adapter_model.safetensors").is_file()
    if name.startswith("zero"):
        return
    expected, found = ranks(tmp_path / "three"), ranks(tmp_path / "skip")
    assert found[0]["losses"][:3] == expected[0]["losses"]
    assert len(found[0]["losses"]) == 6
    assert all(torch.tensor(rank["losses"][4:]).isfinite().all() for rank in found)
    assert found[0]["updates"] == found[1]["updates"]
    assert all(torch.tensor(update).isfinite().all() for update in found[0]["updates"].values())
