"""Steps over several batches on two ranks equal those over one large batch on one device, under every strategy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from tests.distributed import windows
from tests.distributed.launch import launch, ranks, require

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


RUNS: dict[str, dict[str, Any]] = {"free": {}, "clipped": {"clip": 0.02}, "noise": {"noise": True}}


def adapter(folder: Path) -> dict[str, Tensor]:
    found = load_file(folder / "out" / "adapter" / "adapter_model.safetensors")
    return {name: value for name, value in found.items() if name.endswith(".U")}


def large_batches(runs: Mapping[str, Any], model: str, parent: Path) -> Path:
    """Make the runs with large batches, each in a folder of its name."""
    for name, options in runs.items():
        (parent / name).mkdir()
        windows.run({"folder": str(parent / name), "model": model, **options})
    return parent


def check_adapter(found: Path, expected: Path) -> None:
    """Whether two runs ended with the same adapter, as far as the order of sums allows."""
    ours, theirs = adapter(found), adapter(expected)
    assert theirs.keys() == ours.keys()
    for key, value in theirs.items():
        assert float((ours[key] - value).norm()) <= 1e-4 * float(value.norm()), (found.name, key)


@pytest.fixture(scope="module")
def whole(tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of the runs with large batches: as they are, clipped, and with noise on the weights."""
    return large_batches(RUNS, tiny_llama, tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp1", "fsdp2", "zero2", "zero3"])
def test_equals_large_batches(whole: Path, tmp_path: Path, strategy: str, tiny_llama: str) -> None:
    require(strategy)
    common = {"strategy": strategy, "model": tiny_llama}
    tasks = [{"folder": str(tmp_path / name), **options, **common} for name, options in RUNS.items()]
    again = {"folder": str(tmp_path / "again"), "checkpoint": str(tmp_path / "free" / "inside.ckpt"), **common}
    errors = launch("tests.distributed.windows", [*tasks, again])
    for name in RUNS:
        check_adapter(tmp_path / name, whole / name)
        for record in ranks(tmp_path / name):
            assert record["steps"] == 6
        points = windows.json.loads((whole / name / "rank0.json").read_text())["curve"]
        assert ranks(tmp_path / name)[0]["curve"] == [[step, pytest.approx(loss, rel=1e-5)] for step, loss in points]
    lost = "the gradients of its first 1 of 2 batches are not in the checkpoint" in errors
    assert lost is (strategy != "ddp")
    if not lost:
        for key, value in adapter(tmp_path / "free").items():
            assert float((adapter(tmp_path / "again")[key] - value).norm()) <= 1e-4 * float(value.norm()), key
