"""DDP on two processes: same indices and U on both ranks, exact resume, one writer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests import forks


def run(folder: Path, checkpoint: str) -> list[dict[str, Any]]:
    """What each of the two ranks wrote down."""
    folder.mkdir()
    done = forks.run(["-m", "tests.callbacks.ddp", folder, checkpoint])  # Lightning starts the other process
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.distributed
def test_two_ranks(tmp_path: Path) -> None:
    first, second = run(tmp_path / "whole", "")
    assert first["indices"] == second["indices"]
    assert first["u"] == second["u"]
    assert any(abs(v) > 1e-3 for row in first["u"]["net.0"] for v in row)
    assert first["losses"] != second["losses"]  # each rank saw its own share
    assert len(first["losses"]) == 9
    results = tmp_path / "whole" / "out"
    assert (results / "adapter" / "adapter_model.safetensors").is_file()
    assert (results / "merged" / "model.safetensors").is_file()
    again = run(tmp_path / "again", str(tmp_path / "whole" / "saved" / "step=4.ckpt"))
    assert [r["losses"] for r in again] == [first["losses"][4:], second["losses"][4:]]
    assert again[0]["u"] == first["u"]
