"""`estimate` of every method: kept bytes and peak of a real step, the adapter's file, and the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lightning_pmss import METHODS, save_adapter
from lightning_pmss.cli.tools import run_tool
from lightning_pmss.conversion.convert import conversion_of
from lightning_pmss.estimate import Run, estimate
from tests.estimate.small import (
    BATCH,
    LENGTH,
    allocator_peak,
    forward_backward,
    kept_at_the_head,
    loss_of,
    near,
    small_model,
    write_config,
)
from tests.methods.cases import CASES

SETTINGS = {"micro_batch": BATCH, "sequence_length": LENGTH}


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("case", CASES)
def test_bytes_kept_and_peak_of_a_step(case: str, precision: str, tmp_path: Path) -> None:
    config = CASES[case](rank=8)
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    name = str(dtype).removeprefix("torch.")
    asked = Run(write_config(tmp_path), config=config, precision=precision, weights_dtype=name, **SETTINGS)
    result = estimate(asked, (config.method,), both=False).methods[config.method]
    model = small_model(dtype, config)
    loss, trained = loss_of(model), [p for p in model.parameters() if p.requires_grad]
    forward_backward(loss, trained)()  # caches are filled
    measured = {"kept": kept_at_the_head(model, loss), "peak": allocator_peak(forward_backward(loss, trained))}
    estimated = {
        "kept": result.activations,
        "peak": result.activations + result.logits + result.work + result.gradients,
    }
    report = near(measured, estimated)
    assert not [line for line in report if "OFF" in line], report
    assert sum(p.numel() for p in trained) == result.trainable


@pytest.mark.parametrize("case", CASES)
def test_size_of_the_adapter_file(case: str, tmp_path: Path) -> None:
    config = CASES[case](rank=8)
    run = Run(write_config(tmp_path), config=config, sequence_length=32, weights_dtype="float32", precision="32-true")
    found = estimate(run, (config.method,), both=False).methods[config.method]
    model = small_model(torch.float32, config)
    file = save_adapter(model, tmp_path / "adapter") / "adapter_model.safetensors"
    assert sum(tensor.nbytes for tensor in load_file(file).values()) == found.adapter
    assert found.adapter == conversion_of(model).adapter_bytes  # type: ignore[union-attr]


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", write_config(tmp_path), "--sequence-length", "32"]
    run_tool("estimate", *words, "--method", "miss", "--rank", "16", "--json")
    found = json.loads(capsys.readouterr().out)["methods"]
    assert list(found) == ["miss", "lora", "full"]
    assert found["miss"]["rank"] == 16
    run_tool("estimate", *words, "--method", "lora", "--rank", "4")
    printed = capsys.readouterr().out
    assert "LoRA r=4" in printed
    assert "LoRA: fits devices of 24 GB" in printed
    assert "PMSS" not in printed
    with pytest.raises(SystemExit):
        run_tool("estimate", *words, "--method", "miss", "--columns", "all")
    assert "--columns: not an option of --method miss. Leave it out." in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_tool("estimate", *words, "--method", "lorra")
    assert f"--method lorra is not known; type one of {', '.join(METHODS)}." in capsys.readouterr().err
