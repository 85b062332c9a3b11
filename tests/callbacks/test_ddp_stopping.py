"""Two processes are stopped by signals, refused, or fail: none waits for the other, and nothing trained is lost."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_pmss.files import read_adapter
from tests import forks
from tests.distributed.launch import on_two_processes
from tests.killing import files

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).parents[2]
STEPS = 18  # 6 epochs of 3 batches on each rank


def run(folder: Path, signals: Any = None, **task: Any) -> tuple[int, str, list[dict[str, Any]]]:
    """Status, stderr and what the ranks wrote; `signals` is called with the process when three steps have begun."""
    # Rank 0 is a fork; Lightning starts the other one.
    arguments = ["-m", "tests.callbacks.ddp_stopping", json.dumps({"folder": str(folder)} | task)]
    with forks.Program(arguments, stream=signals is not None) as process:
        if signals is not None:
            for _ in range(3):
                assert process.stdout.readline() == "step\n"
            signals(process)
        status = process.wait(200)
        errors = process.errors()
    found = [folder / f"rank{rank}.json" for rank in (0, 1)]
    return status, errors, [json.loads(f.read_text()) for f in found if f.is_file()]


def run_to_the_end(folder: Path, **task: Any) -> list[dict[str, Any]]:
    """What the ranks wrote; both are forks, which nobody stops."""
    on_two_processes(["-m", "tests.callbacks.ddp_stopping", json.dumps({"folder": str(folder)} | task)])
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[float]]]:
    folder = tmp_path_factory.mktemp("whole")
    ranks = run_to_the_end(folder)
    assert [len(rank["losses"]) for rank in ranks] == [STEPS, STEPS]
    return folder, [rank["losses"] for rank in ranks]


@pytest.mark.parametrize("by", ["Ctrl-C", "SIGTERM"])
def test_both_stop_after_the_same_step(tmp_path: Path, whole: Any, by: str) -> None:
    """A terminal sends Ctrl-C to both, at different moments of their steps; a scheduler may tell the first one alone."""

    def terminal(process: Any) -> None:
        os.killpg(process.pid, signal.SIGINT)

    def scheduler(process: Any) -> None:
        process.send_signal(signal.SIGTERM)

    status, errors, ranks = run(tmp_path, terminal if by == "Ctrl-C" else scheduler, seconds=0.3)
    assert status == (1 if by == "Ctrl-C" else 143), errors[-3000:]
    checkpoint = tmp_path / "saved" / "last-interrupted.ckpt"
    steps = torch.load(checkpoint)["global_step"]
    assert [len(rank["losses"]) for rank in ranks] == [steps, steps]
    assert 0 < steps < STEPS
    assert f"PMSS: stopped by {by} after optimizer step {steps}." in errors
    read_adapter(tmp_path / "out" / "adapter")
    ranks = run_to_the_end(tmp_path, checkpoint=str(checkpoint))
    assert [rank["losses"] for rank in ranks] == [losses[steps:] for losses in whole[1]]
    assert files(tmp_path / "out") == files(whole[0] / "out")


def test_an_error_on_the_first_process_leaves_the_adapter(tmp_path: Path) -> None:
    """The other one waits for it in a collective, and cannot be asked for its part of a checkpoint."""
    status, errors, _ = run(tmp_path, raises=[0, 6])
    assert status not in (0, None)
    assert "of the user" in errors
    assert "PMSS: stopped by ValueError after optimizer step 6." in errors
    assert "No checkpoint is made: the other processes cannot be asked for their part." in errors
    assert f"the last checkpoint is {tmp_path / 'saved' / 'last.ckpt'}" in errors
    read_adapter(tmp_path / "out" / "adapter")
    assert torch.load(tmp_path / "saved" / "last.ckpt")["global_step"] == 4


def test_an_error_on_the_other_process_ends_both(tmp_path: Path) -> None:
    status, errors, _ = run(tmp_path, raises=[1, 6])
    assert status not in (0, None)
    assert "of the user" in errors
    assert torch.load(tmp_path / "saved" / "last.ckpt")["global_step"] == 4


def test_what_is_in_the_way_is_refused_by_both(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    status, _, ranks = run(tmp_path)
    assert status == 1
    assert ranks[0]["error"] == ranks[1]["error"]
    assert "Not a directory: nothing can be written in" in ranks[0]["error"]
    assert not ranks[0]["losses"]


def test_what_came_into_the_way_meanwhile(tmp_path: Path) -> None:
    """Only the first process writes and fails; both go on to another place together."""

    def put(_: Any) -> None:
        (tmp_path / "out" / "adapter").mkdir(parents=True)
        (tmp_path / "out" / "adapter" / "thesis.txt").write_text("mine")

    status, errors, _ = run(tmp_path, put, seconds=0.1)
    assert status == 0, errors[-3000:]
    read_adapter(tmp_path / "out" / "adapter-2")
    assert (tmp_path / "out" / "merged" / "model.safetensors").is_file()
