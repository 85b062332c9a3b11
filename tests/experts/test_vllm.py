"""LoRAs of experts under the names that vLLM reads: each expert's gate, up and down as the base's files call them.

vLLM is not installed. `packed` does what its loader does with such a file (`LoRAModel.from_local_checkpoint`, `pack_moe`), and
the reference is a merge on disk, whose tensors have the same names.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lightning_pmss import convert, save_adapter
from lightning_pmss.cli.tools import run_tool
from lightning_pmss.files import merge_files
from lightning_pmss.files.lora import export_files
from tests.experts.toys import mixture, tokens, train
from tests.methods.cases import CASES

NAMES = {"mixtral": ("w1", "w2", "w3")}
OWNERS = {"mixtral": "block_sparse_moe"}
MODELS = ["mixtral", "qwen3_moe", "deepseek"]
PREFIX = "base_model.model."


def made(name: str, method: str, folder: Path, **options: Any) -> Any:
    mixture(name).save_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    convert(model, CASES[method](**{"rank": 4} | options))
    save_adapter(train(model), folder / "adapter")
    return model


def packed(folder: Path, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The change of every matrix, by name in the base's files; and w1, w2, w3 of each layer's experts, as stacked factors."""
    tensors, config = (
        load_file(folder / "adapter_model.safetensors"),
        json.loads((folder / "adapter_config.json").read_text()),
    )
    scaling = config["lora_alpha"] / config["r"]  # the general fields alone
    factors: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        parts = key.split(".")
        assert key.startswith(PREFIX)
        assert parts[-1] == "weight"
        assert parts[-2] in ("lora_A", "lora_B")
        factors.setdefault(".".join(parts[2:-2]), {})[parts[-2]] = value
    owners = {n.rpartition(".experts.")[0] for n in factors if ".experts." in n}
    stacks = {}
    for owner in owners:
        for part in NAMES.get(name, ("gate_proj", "down_proj", "up_proj")):
            own = [factors[f"{owner}.experts.{i}.{part}"] for i in range(4)]  # KeyError: vLLM's assertions
            stacks[f"{owner}.{part}"] = torch.stack([f["lora_A"] for f in own]), torch.stack([f["lora_B"] for f in own])
    return {n: scaling * f["lora_B"] @ f["lora_A"] for n, f in factors.items()}, stacks


@pytest.mark.parametrize("method", ["lora", "pmss", "pmss columns=all", "miss", "lora_xs", "curlora"])
@pytest.mark.parametrize("name", MODELS)
def test_names_and_numbers_are_those_of_a_merge(name: str, method: str, tmp_path: Path) -> None:
    made(name, method, tmp_path)
    report = export_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "lora", format="vllm", progress=False)
    assert report.served
    assert not report.errors
    merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", progress=False)
    base, merged = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "merged"))
    changes, stacks = packed(tmp_path / "lora", name)
    assert {f"{n}.weight" for n in changes} == {key for key in base if not torch.equal(base[key], merged[key])}
    for key, change in changes.items():
        torch.testing.assert_close(
            base[f"{key}.weight"] + change, merged[f"{key}.weight"], rtol=1e-4, atol=1e-5, msg=key
        )
    owner = f"model.layers.1.{OWNERS.get(name, 'mlp')}"
    for part in NAMES.get(name, ("gate_proj", "down_proj", "up_proj")):
        assert stacks[f"{owner}.{part}"][0].shape[:2] == (4, 4)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["target_parameters"] is None
    assert config["r"] == config["lora_alpha"]
    assert set(NAMES.get(name, ("gate_proj", "down_proj", "up_proj"))) <= set(config["target_modules"])


@pytest.mark.parametrize("name", MODELS)
def test_what_the_adapter_lacks_is_zero(name: str, tmp_path: Path) -> None:
    """vLLM asks for gate, up and down of each expert; ranks may differ."""
    made(
        name,
        "lora",
        tmp_path,
        target_modules=["o_proj"],
        target_parameters=["down_proj"],
        rank_pattern={"down_proj": 6},
    )
    export_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "lora", format="vllm", progress=False)
    merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", progress=False)
    base, merged = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "merged"))
    changes, stacks = packed(tmp_path / "lora", name)
    for key, change in changes.items():
        torch.testing.assert_close(
            base[f"{key}.weight"] + change, merged[f"{key}.weight"], rtol=1e-4, atol=1e-5, msg=key
        )
    assert all(a.shape[1] == 6 and b.shape[2] == 6 for a, b in stacks.values())
    down = NAMES.get(name, ("", "down_proj"))[1]
    assert {key.rpartition(".")[2] for key, (_, b) in stacks.items() if b.any()} == {down}
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 6


@pytest.mark.parametrize("name", MODELS)
def test_peft_reads_the_names_too(name: str, tmp_path: Path) -> None:
    """As those of an older transformers; but where other layers have such names, the card does not say so."""
    peft = pytest.importorskip("peft")
    alone = {"exclude_modules": ["layers.0.mlp", "shared_experts"]} if name == "deepseek" else {}
    model = made(name, "pmss", tmp_path, **alone)
    export_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "lora", format="vllm", progress=False)
    assert "## Load with peft" in (tmp_path / "lora" / "README.md").read_text()
    other = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(tmp_path / "lora")
    )
    torch.testing.assert_close(other(tokens()).logits, model(tokens()).logits, rtol=1e-3, atol=1e-4)
    if alone:
        made(name, "pmss", tmp_path / "all")
        export_files(tmp_path / "all/base", tmp_path / "all/adapter", tmp_path / "more", format="vllm", progress=False)
        assert "## Load with peft" not in (tmp_path / "more" / "README.md").read_text()


def test_cut_to_a_rank_and_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made("mixtral", "hira", tmp_path)
    with pytest.raises(ValueError, match="no product of two thin matrices"):
        export_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "never", format="vllm", progress=False)
    folders = ("--base", tmp_path / "base", "--adapter", tmp_path / "adapter", "--output", tmp_path / "lora")
    run_tool("export", "--format", "vllm", "--rank", "32", *map(str, folders))
    assert "vLLM needs --max-lora-rank 32." in capsys.readouterr().out
    merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", progress=False)
    base, merged = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "merged"))
    changes, _ = packed(tmp_path / "lora", "mixtral")
    for key, change in changes.items():
        torch.testing.assert_close(
            base[f"{key}.weight"] + change, merged[f"{key}.weight"], rtol=1e-3, atol=1e-4, msg=key
        )


def test_a_model_without_experts_has_the_names_of_peft(tmp_path: Path) -> None:
    made("qwen3_moe", "pmss", tmp_path, exclude_modules=["experts"])
    for format in ("peft", "vllm"):
        export_files(tmp_path / "base", tmp_path / "adapter", tmp_path / format, format=format, progress=False)
    one, two = (load_file(tmp_path / format / "adapter_model.safetensors") for format in ("peft", "vllm"))
    assert one.keys() == two.keys()
    assert all(torch.equal(value, two[key]) for key, value in one.items())


def test_what_has_no_such_form_is_refused_by_name(tmp_path: Path) -> None:
    made("gpt_oss", "lora", tmp_path)
    with pytest.raises(ValueError, match=r"keep the experts of this model in one tensor.*--format peft, or merge"):
        export_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "lora", format="vllm", progress=False)
    with pytest.raises(ValueError, match="vLLM reads LoRA only: leave --as native out"):
        export_files(
            tmp_path / "base", tmp_path / "adapter", tmp_path / "lora", format="vllm", native=True, progress=False
        )
    report = export_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "peft", progress=False)
    assert "vLLM has names of its own for the experts of most models" in report.vllm()
    assert not (tmp_path / "lora").exists()
