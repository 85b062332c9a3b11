"""Adapters of experts as LoRA for peft's ``target_parameters``: loaded by peft, the logits are the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_pmss import convert, export_lora, export_peft, save_adapter
from lightning_pmss.files.lora import export_files
from tests.experts.toys import mixture, tokens, train
from tests.methods.cases import CASES

peft = pytest.importorskip("peft")
EXACT = ["lora", "pmss", "pmss columns=all", "miss", "miss mini_rank=8", "lora_xs", "curlora"]
LINEAR = {"deepseek": {"exclude_modules": ["layers.0.mlp", "shared_experts"]}}


def made(name: str, method: str, folder: Path, **options: Any) -> Any:
    mixture(name).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    convert(model, CASES[method](**{"rank": 4} | LINEAR.get(name, {}) | options))
    return train(model)


def loaded(base: Path, folder: Path) -> torch.Tensor:
    model: Any = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder))
    logits: torch.Tensor = model(tokens()).logits
    return logits


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek"])
def test_peft_gives_the_same_logits(name: str, method: str, tmp_path: Path) -> None:
    model = made(name, method, tmp_path / "base")
    wanted = model(tokens()).logits
    export_lora(model, tmp_path / "live")
    torch.testing.assert_close(loaded(tmp_path / "base", tmp_path / "live"), wanted, rtol=1e-3, atol=1e-4)
    save_adapter(model, tmp_path / "adapter")
    export_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "files", native=False, progress=False)
    torch.testing.assert_close(loaded(tmp_path / "base", tmp_path / "files"), wanted, rtol=1e-3, atol=1e-4)
    config = json.loads((tmp_path / "files" / "adapter_config.json").read_text())
    assert config["target_parameters"] == sorted(
        f"model.layers.{layer}.mlp.experts.{key}"
        for layer in ((1,) if name == "deepseek" else (0, 1))
        for key in ("gate_up_proj", "down_proj")
    )


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": [], "target_parameters": ["down_proj"]},
        {"target_modules": ["q_proj"], "target_parameters": ["gate_up_proj"]},
        {"rank_pattern": {"down_proj": 2, "layers.0.mlp.experts.gate_up_proj": 3, "q_proj": 5}},
        {"target_modules": [], "target_parameters": ["gate_up_proj", "down_proj"]},
    ],
)
def test_some_parameters_and_ranks(options: dict[str, Any], tmp_path: Path) -> None:
    model = made("gpt_oss", "lora", tmp_path / "base", **options)
    report = export_peft(model, tmp_path / "lora", native=True)
    assert not report.served
    torch.testing.assert_close(
        loaded(tmp_path / "base", tmp_path / "lora"), model(tokens()).logits, rtol=1e-3, atol=1e-4
    )


def test_cut_to_a_rank(tmp_path: Path) -> None:
    model = made("mixtral", "hira", tmp_path / "base")
    report = export_lora(model, tmp_path / "cut", rank=32)
    assert 0 <= max(report.errors.values(), default=0.0) < 1e-5  # the smaller side of each matrix: nothing is lost
    torch.testing.assert_close(
        loaded(tmp_path / "base", tmp_path / "cut"), model(tokens()).logits, rtol=1e-3, atol=1e-4
    )
    report = export_lora(model, tmp_path / "less", rank=2)
    assert report.errors["model.layers.1.mlp.experts.down_proj"] > 0.1
    with pytest.raises(ValueError, match=r"no product of two thin matrices"):
        export_lora(model, tmp_path / "never")


def test_what_peft_cannot_have_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"one of several fused experts, which peft has in no type but LoRA.*--as lora"
    ):
        export_peft(made("mixtral", "miss", tmp_path / "a"), tmp_path / "lora", native=True)
    with pytest.raises(ValueError, match=r"one of several fused experts, which peft has in no type but LoRA"):
        export_peft(made("mixtral", "hira", tmp_path / "b"), tmp_path / "lora")
    model = made("deepseek", "lora", tmp_path / "c", exclude_modules=[])
    with pytest.raises(ValueError, match=r"mlp\.gate_proj is a linear layer beside fused experts, and peft takes"):
        export_peft(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
