"""LLaMA-2-13B's architecture, converted on the meta device from a skeleton file: no weight is ever there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lightning_pmss import PMSSConfig, convert
from lightning_pmss.conversion.convert import adapted_layers
from lightning_pmss.layers.fingerprint import fingerprint

ARCHITECTURE = Path(__file__).parents[1] / "fixtures" / "architectures" / "llama-2-13b.json"
TOTAL = 13_015_864_320


def meta_13b() -> torch.nn.Module:
    from transformers import AutoModelForCausalLM, LlamaConfig

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(LlamaConfig(**json.loads(ARCHITECTURE.read_text())))


def skeleton_file(model: torch.nn.Module, names: list[str], rank: int, file: Path) -> Path:
    """Any distinct indices will do, and spectral coordinates have the smallest frames."""
    modules = dict(model.named_modules())
    generator = torch.Generator().manual_seed(rank)
    tensors, about = {}, {}
    for name in names:
        out, width = modules[name].out_features, modules[name].in_features
        tensors[f"{name}.rows"] = torch.randperm(out, generator=generator)[:rank].int()
        tensors[f"{name}.cols"] = torch.randperm(width, generator=generator)[:rank].int()
        tensors[f"{name}.gain"] = torch.rand((), generator=generator)
        about[name] = {"shape": [out, width], "fingerprint": fingerprint(torch.zeros(1, 1), torch.zeros(1, 1))}
    metadata = {"format_version": 1, "coordinates": "spectral", "modules": about}
    save_file(tensors, file, {"pmss_skeleton": json.dumps(metadata)})
    return file


@pytest.mark.parametrize(
    ("targets", "rank", "trained", "percent"),
    [
        (["q_proj", "v_proj"], 128, 1.31e6, 0.010),
        (["q_proj", "v_proj"], 512, 21.0e6, 0.161),
        ("all-linear", 256, 18.4e6, 0.141),
        ("all-linear", 1024, 293.6e6, 2.256),
    ],
)
def test_parameter_counts_are_those_of_the_table(
    tmp_path: Path, targets: str | list[str], rank: int, trained: float, percent: float
) -> None:
    model = meta_13b()
    linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    names = [n for n in linear if targets == "all-linear" or n.rsplit(".", 1)[-1] in targets]
    file = skeleton_file(model, names, rank, tmp_path / "skeleton.safetensors")
    config = PMSSConfig(targets, rank=rank, coordinates="spectral", skeleton_file=str(file))
    report = convert(model, config)
    assert len(report.layers) == len(names) == (280 if targets == "all-linear" else 80)
    assert report.trainable == len(names) * rank * rank
    assert report.trainable == pytest.approx(trained, rel=5e-3)
    assert report.total == TOTAL + report.trainable
    assert 100 * report.trainable / TOTAL == pytest.approx(percent, abs=6e-4)
    assert all(layer.weight.is_meta for layer in adapted_layers(model).values())
    assert all(p.is_meta for p in model.parameters())
