"""Selecting needs some copies of one matrix per worker, however large the checkpoint and its shards."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import select as benchmark


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
@pytest.mark.parametrize("shards", [1, 12])
def test_peak_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int) -> None:
    # glibc keeps freed blocks below its sliding threshold (some 50 MB here); what is to be measured is what is in use.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1000000")
    model = benchmark.make_checkpoint(tmp_path / "model", layers=12, hidden=1024, intermediate=2816, shards=shards)
    total = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    assert total > 300e6
    found = benchmark.select_in_a_fresh_process(model, tmp_path / "s.safetensors", 32, 2)
    assert found["selected"] == 84
    matrix = 4 * 1024 * 2816  # in float32
    assert 0 < found["peak_growth"] < 2 * 4 * matrix + 30e6
    assert found["peak_growth"] < total / 2
