"""The loss under weight noise, and the table of combined adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from experiments.combined import TASKS, combined_table
from experiments.flatness import SIZES, noisy
from experiments.run import Places, run
from lightning_pmss import LoRAConfig, convert, merge
from lightning_pmss.conversion.convert import adapted_layers
from lightning_pmss.layers.weight_noise import draw, seed_of


def test_noise_is_that_of_a_dense_merged_weight() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 5)).double()
    convert(model, LoRAConfig(target_modules=["0", "2"], rank=2))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    x = torch.randn(4, 12, dtype=torch.float64)
    plain = model(x)
    with noisy(model) as size:
        assert torch.equal(model(x), plain)
        size[0] = 0.3
        found = model(x)
    assert torch.equal(model(x), plain)

    merge(model)
    with torch.no_grad():
        for name, layer in adapted_layers(model).items():
            std = layer.weight.float().norm(dim=1) / layer.weight.shape[1] ** 0.5
            layer.weight += 0.3 * draw(std, layer.weight.shape[1], seed_of(name), torch.float64)
    torch.testing.assert_close(found, model(x), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(found, plain, atol=1e-2)


def test_a_run_reports_its_loss_under_noise(tiny_llama: str, tmp_path: Path) -> None:
    places = Places((str(Path(tiny_llama).parent),), str(tmp_path), str(tmp_path / "cache"))
    spec = {
        "model": Path(tiny_llama).name,
        "dtype": "float32",
        "precision": "32-true",
        "task": {"name": "pairs", "size": 8, "batch_size": 8},
        "method": {"name": "our lora", "rank": 2},
        "lr": 3e-2,
        "seed": 1,
        "steps": 40,
        "evaluate": ["test", "noise"],
    }
    scores = run(spec, places)["scores"]
    assert [key for key in scores if key.startswith("noise/")] == [f"noise/{size}" for size in SIZES]
    assert scores["test/loss"] < scores["noise/0.2"] < scores["noise/0.4"]


def test_noise_refuses_an_unconverted_model() -> None:
    with pytest.raises(ValueError, match="the model has none"), noisy(nn.Linear(2, 2)):
        pass


def test_gain_kept_is_relative_to_the_own_adapter() -> None:
    scores = {"no adapter": dict.fromkeys(TASKS, 2.0)}
    for own in TASKS:
        scores[f"{own} alone"] = {task: 1.0 if task == own else 2.5 for task in TASKS}
    scores["cat"] = dict.fromkeys(TASKS, 1.25)
    lines = combined_table({"scores": scores}).splitlines()
    assert lines[-1] == "| cat " + "| 1.250 | 75% " * 3 + "| 75% |"
    assert "| 1.000 | 100% | 2.500 | -50% | 2.500 | -50% | 0% |" in lines[-4]
