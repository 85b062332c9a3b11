"""Launchers that train in other processes: the one that called `fit` holds the result."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lightning_pmss.callbacks.launched import follow_launchers
from tests import forks
from tests.callbacks.toys import inputs, make_net


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("strategy", "devices", "built"),
    [("ddp_fork", 2, "early"), ("ddp_spawn", 2, "late"), ("ddp_notebook", 1, "late")],
)
def test_the_main_process_holds_what_was_trained(tmp_path: Path, strategy: str, devices: int, built: str) -> None:
    done = forks.run(["-m", "tests.callbacks.launched", tmp_path, strategy, str(devices), built])
    assert done.returncode == 0, done.stderr[-4000:]
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["v"] > 0.1
    assert record["converted"] == 2
    assert record["validate"] == pytest.approx(record["fit"], rel=1e-5)
    assert record["other trainer"] == pytest.approx(record["loss"], rel=1e-5)
    first, again = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("out/adapter", "again"))
    assert set(first) == set(again)
    assert all(torch.equal(first[key], again[key]) for key in first)
    plain = make_net()
    state = load_file(tmp_path / "out" / "merged" / "model.safetensors")
    plain.load_state_dict({k.removeprefix("net."): v for k, v in state.items()})
    output = plain(inputs().tensors[0])
    for name in ("output", "merged"):
        torch.testing.assert_close(torch.tensor(record[name]), output, rtol=1e-4, atol=1e-5)


@pytest.mark.distributed
def test_a_stop_in_launched_processes_leaves_what_was_trained(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.callbacks.launched_stop", str(tmp_path), "ddp_fork"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
    assert torch.load(tmp_path / "out" / "last-interrupted.ckpt")["global_step"] == 4
    assert not (tmp_path / "main.ckpt").exists()


def test_lightning_s_method_is_replaced_once() -> None:
    from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher

    follow_launchers()
    before = _MultiProcessingLauncher._recover_results_in_main_process
    follow_launchers()
    assert _MultiProcessingLauncher._recover_results_in_main_process is before
    assert not hasattr(before.__wrapped__, "__wrapped__")  # type: ignore[attr-defined]
