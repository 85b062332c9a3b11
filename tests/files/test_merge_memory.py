"""The streaming merge needs one shard and one matrix, not the model."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import merge as benchmark


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
def test_peak_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # glibc keeps freed blocks below its sliding threshold (some 50 MB here); what is to be measured is what is in use.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1000000")
    base, adapter = benchmark.make_inputs(tmp_path, shards=9, matrices=16, width=1024, rank=64)
    shard, matrix = 2 * 16 * 1024**2, 2 * 1024**2
    total = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    assert total > 300e6
    grown = benchmark.peak_growth(base, adapter, tmp_path / "merged")
    blocks = 8 * 4 * 2**20  # float32 copies of a block of rows, whatever the size of the matrix
    assert 0 < grown < shard + 4 * matrix + blocks + 20e6
    assert grown < total / 2
