"""The benchmarks run at their smallest size, and say what they must; whether their figures are good is not asked here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import experts, gpu, optimizer_step, step
from benchmarks.rivals import RIVALS, Case, blocks, build, run, trained

OURS = ["pmss keep", "pmss regather", "naive"]


def test_step_writes_figures_of_every_rival(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    plot = tmp_path / "plot.png"
    arguments = [
        "--case",
        "smallest",
        "--rounds",
        "2",
        "--output",
        str(tmp_path),
        "--plot",
        str(plot),
        "--rivals",
        *OURS,
    ]
    step.main(arguments)
    torch.set_num_threads(threads)
    result = json.loads((tmp_path / "step-64-16.json").read_text())
    assert list(result["rivals"]) == ["frozen", *OURS]
    assert result["counted_bound"] == pytest.approx(step.bound(step.SMALLEST), abs=1e-4)
    for name, figures in result["rivals"].items():
        assert figures["trained"] == (0 if name == "frozen" else 7 * 16 * 16)
        assert figures["over frozen"]["min"] <= figures["over frozen"]["median"] <= figures["over frozen"]["max"]
    assert result["rivals"]["frozen"]["saved_bytes_above_floor"] == 0
    assert result["rivals"]["pmss regather"]["saved_bytes_above_floor"] == 7 * (16 * 16 + 16 * 16) * 4  # h, U
    assert plot.stat().st_size > 0
    assert "| pmss keep | 1,792 |" in capsys.readouterr().out


def test_optimizer_step_writes_spreads_of_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, threads = tmp_path / "found.json", torch.get_num_threads()
    sizes = ["--ranks", "4", "8", "--matrices", "2", "--rounds", "3", "--width", "16"]
    optimizer_step.main([*sizes, "--json", str(file)])
    assert torch.get_num_threads() == threads
    found = json.loads(file.read_text())["ranks"]
    assert [entry["rank"] for entry in found] == [4, 8]
    for entry in found:
        for name in ("adamw", "muon", "ratio"):
            assert 0 < entry[name]["min"] <= entry[name]["median"] <= entry[name]["max"]
            assert entry[name]["n"] == 3
    assert "| 8 " in capsys.readouterr().out


def test_the_two_optimizers_step_cores_of_their_own() -> None:
    for name, optimizer in optimizer_step.optimizers(rank=6, matrices=2).items():
        cores = optimizer.param_groups[0]["params"]
        assert [tuple(core.shape) for core in cores] == [(6, 6)] * 2
        optimizer.step()
        assert all(core.abs().max() > 0 for core in cores), name


@pytest.mark.parametrize("bound", [(1024, 128, 1.085), (1024, 256, 1.196), (2048, 256, 1.085), (4096, 256, 1.040)])
def test_counted_bound(bound: tuple[int, int, float]) -> None:
    hidden, rank, expected = bound
    assert step.bound(Case(hidden, rank)) == pytest.approx(expected, abs=0.001)


def test_rivals_share_the_base_and_start_as_it() -> None:
    pytest.importorskip("peft")
    torch.manual_seed(0)
    case = Case(64, 16, layers=1, length=8)
    base = blocks(case)
    x = torch.randn(2, 8, 64)
    expected = run(base, x)
    storages = {p.untyped_storage().data_ptr() for p in base.parameters()}
    for name in RIVALS:
        model = build(name, base, case)
        assert storages <= {p.untyped_storage().data_ptr() for p in model.parameters()}, name
        assert torch.allclose(run(model, x), expected, atol=1e-4) is not name.endswith("FlatLoRA"), name
        assert (trained(model) > 0) == (name != "frozen")
        assert not any(p.requires_grad for p in base.parameters()), name


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU it takes eight minutes")
def test_gpu_script_runs_its_smallest_case_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sections = ["blocks", "selection", "weight_edit", "whole"]
    found = gpu.main(["--output", str(tmp_path), "--rivals", *OURS, "--sections", *sections])
    assert "no figures to report" in capsys.readouterr().out
    assert json.loads((tmp_path / "gpu-none-cpu-smallest.json").read_text()) == json.loads(json.dumps(found))
    assert set(sections) <= set(found)
    assert set(found["blocks"][0]["rivals"]) == {"frozen", *OURS}
    assert found["weight_edit"][0]["tokens"] == 64
    assert found["skipped"] == []


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    clock = gpu.Clock(0)
    result = gpu.compare(gpu.CPU_CASES[0], ["frozen"], "cpu", clock, rounds=1, seconds=5)
    assert result["rivals"] == {}
    assert clock.skipped == ["64/16, 1 layers, 8 tokens, frozen: 0 s left, 5 s wanted"]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU it takes eight minutes")
def test_gpu_script_compiles(tmp_path: Path) -> None:
    found = gpu.main(["--output", str(tmp_path), "--rivals", "pmss regather", "--sections", "compiled"])
    assert found["compiled"][0]["recompiled_while_timed"] is False
    assert found["compiled"][0]["rivals"]["pmss regather"]["trained"] > 0


def test_experts_keep_less_than_peft(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="the benchmark compares with peft")
    small = ["--hidden", "64", "--inner", "48", "--experts", "4", "--layers", "1", "--tokens", "32", "--repeats", "1"]
    result = experts.main([*small, "--json", str(tmp_path / "experts.json")])
    kept = result["kept_bytes"]
    assert json.loads((tmp_path / "experts.json").read_text())["kept_bytes"] == kept
    assert result["trained"]["no adapter"] == 0
    assert result["trained"]["LoRA"] == result["trained"]["LoRA of peft"]
    assert kept["no adapter"] < kept["MiSS"] < kept["LoRA"] < kept["LoRA of peft"]
