"""Sharded runs that are stopped, or were finished: every rank takes part in what is written, and they go on exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launch import launch, ranks, require
from tests.killing import files

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.mark.parametrize("name", ["fsdp1", "fsdp2", "zero3"])
def test_stopped_and_finished(tmp_path: Path, name: str) -> None:
    require(name)
    options: dict[str, Any] = {"strategy": name, "steps": 6, "callback": {"dropout": 0.3}}
    stopped = tmp_path / "stopped" / "saved" / "last-interrupted.ckpt"
    finished = tmp_path / "whole" / "saved" / "step=6.ckpt"
    first: list[dict[str, Any]] = [
        {"folder": str(tmp_path / "whole")},
        {"folder": str(tmp_path / "stopped"), "stop_at": 3},
    ]
    first[1]["raises"] = "SIGTERMException"
    second = [
        {"folder": str(tmp_path / "resumed"), "checkpoint": str(stopped)},
        {"folder": str(tmp_path / "finished"), "checkpoint": str(finished)},
    ]
    for tasks in (first, second):  # a process that was stopped ends, and the next one starts anew
        launch("tests.distributed.script", [options | task for task in tasks])
    whole = [rank["losses"] for rank in ranks(tmp_path / "whole")]
    assert [rank["losses"] for rank in ranks(tmp_path / "stopped")] == [losses[:3] for losses in whole]
    assert [rank["losses"] for rank in ranks(tmp_path / "resumed")] == [losses[3:] for losses in whole]
    assert [rank["losses"] for rank in ranks(tmp_path / "finished")] == [[], []]
    expected = files(tmp_path / "whole" / "out")
    for again in ("resumed", "finished"):
        found = files(tmp_path / again / "out")
        assert sorted(found) == sorted(expected)
        weights = [name for name in found if name.endswith(".safetensors")]
        assert all(found[name] == expected[name] for name in weights)
    card = (tmp_path / "stopped" / "out" / "adapter" / "README.md").read_text()
    assert "- optimizer steps: 3\n- not finished: stopped by" in card
