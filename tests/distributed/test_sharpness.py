"""SAM and BSAM over uneven windows on two ranks equal those over one large batch on one device; DeepSpeed is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed import windows
from tests.distributed.launch import launch, ranks, require
from tests.distributed.test_windows import check_adapter, large_batches

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

RUNS: dict[str, dict[str, Any]] = {
    "sam": {"optimizer": "sam", "clip": 0.02},
    "bsam": {"optimizer": "bsam", "save": ["after.ckpt"]},
    "noise": {"optimizer": "published", "noise": True},
}


@pytest.fixture(scope="module")
def whole(tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of the runs with large batches."""
    return large_batches(RUNS, tiny_llama, tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp1", "fsdp2"])
def test_equals_large_batches(whole: Path, tmp_path: Path, strategy: str, tiny_llama: str) -> None:
    require(strategy)
    common = {"strategy": strategy, "model": tiny_llama}
    tasks = [{"folder": str(tmp_path / name), **options, **common} for name, options in RUNS.items()]
    again = {
        "folder": str(tmp_path / "again"),
        "checkpoint": str(tmp_path / "bsam" / "after.ckpt"),
        "optimizer": "bsam",
    }
    launch("tests.distributed.windows", [*tasks, again | common])
    for name in (*RUNS, "again"):
        same = "bsam" if name == "again" else name
        check_adapter(tmp_path / name, whole / same)
        assert [record["steps"] for record in ranks(tmp_path / name)] == [6, 6]
        points = windows.json.loads((whole / same / "rank0.json").read_text())["curve"]
        assert ranks(tmp_path / name)[0]["curve"] == [[step, pytest.approx(loss, rel=1e-5)] for step, loss in points]


def test_deepspeed_is_refused(tmp_path: Path, tiny_llama: str) -> None:
    require("zero2")
    task = {"folder": str(tmp_path / "zero"), "strategy": "zero2", "model": tiny_llama, "optimizer": "bsam"}
    errors = launch("tests.distributed.windows", [task], fails=True)
    assert "BSAM is not possible under DeepSpeed, whose engine owns the gradients and the step" in errors
