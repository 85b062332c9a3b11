"""Each method in peft's own type: peft, on the untouched base, computes what our merged model computes."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_pmss import (
    BATConfig,
    CURLoRAConfig,
    HiRAConfig,
    HUTConfig,
    LoRAConfig,
    LoRAXSConfig,
    MiSSConfig,
    PMSSConfig,
    convert,
    export_lora,
    export_peft,
    merge,
    save_adapter,
)
from lightning_pmss.cli import main
from lightning_pmss.cli.tools import run_tool
from lightning_pmss.conversion.convert import adapted_layers
from lightning_pmss.files import export_files

peft = pytest.importorskip("peft")


def base(folder: Path | str) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    bert = "Bert" in (Path(folder) / "config.json").read_text()
    return (AutoModelForSequenceClassification if bert else AutoModelForCausalLM).from_pretrained(folder).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=torch.arange(1, 21).reshape(2, 10)).logits
    return found


def trained(model: Any, config: Any) -> Any:
    convert(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def in_peft(model: nn.Module, folder: Path) -> Any:
    """peft's model; a warning (missing or foreign keys, patterns without a match) is an error here."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        return peft.PeftModel.from_pretrained(model, str(folder))


FUSED = {"phi3": ["qkv_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"]}
CASES: dict[str, tuple[str, Any, str]] = {
    "LoRA, LLaMA": ("llama", LoRAConfig(rank=4, rank_pattern={"q_proj": 6}, also_train="lm_head"), "LORA"),
    "LoRA, BERT": ("bert", LoRAConfig(rank=4, also_train="classifier"), "LORA"),
    "LoRA, GPT-2": ("gpt2", LoRAConfig(rank=4, target_modules=FUSED["gpt2"]), "LORA"),
    "LoRA, Phi-3": ("phi3", LoRAConfig(rank=4, target_modules=FUSED["phi3"]), "LORA"),
    "MiSS, LLaMA": ("llama", MiSSConfig(rank=12, dropout=0.1, also_train="lm_head"), "MISS"),
    "MiSS of two ranks": ("llama", MiSSConfig(rank=8, rank_pattern={"q_proj": 6}), "MISS"),
    "MiSS, mini": ("llama", MiSSConfig(rank=8, mini_rank=4), "MISS"),
    "MiSS, mini of two ranks": ("llama", MiSSConfig(rank=8, mini_rank=4, rank_pattern={"q_proj": 4}), "MISS"),
    "MiSS, BERT": ("bert", MiSSConfig(rank=8, also_train="classifier"), "MISS"),
    "MiSS, Phi-3": ("phi3", MiSSConfig(rank=8, target_modules=FUSED["phi3"]), "MISS"),
    "BAT, LLaMA": ("llama", BATConfig(rank=8, also_train="lm_head"), "MISS"),
    "BAT, BERT": ("bert", BATConfig(rank=16, also_train="classifier"), "MISS"),
    "BAT, Phi-3": ("phi3", BATConfig(rank=8, target_modules=FUSED["phi3"]), "MISS"),
    "HiRA, LLaMA": ("llama", HiRAConfig(rank=4, scale=0.5, rank_pattern={"q_proj": 6}, also_train="lm_head"), "HIRA"),
    "HiRA, BERT": ("bert", HiRAConfig(rank=4, also_train="classifier"), "HIRA"),
    "HiRA, GPT-2": ("gpt2", HiRAConfig(rank=4, target_modules=FUSED["gpt2"]), "HIRA"),
    "HiRA, Phi-3": ("phi3", HiRAConfig(rank=4, target_modules=FUSED["phi3"]), "HIRA"),
}


@pytest.mark.parametrize("case", CASES)
def test_peft_computes_what_the_merged_model_computes(case: str, bases: dict[str, Path], tmp_path: Path) -> None:
    name, config, kind = CASES[case]
    model = trained(base(bases[name]), config)
    save_adapter(model, tmp_path / "adapter")
    report = export_peft(model, tmp_path / "live", native=True, progress=False)
    run_tool(
        "export", "--format", "peft", "--base", str(bases[name]), "--adapter", str(tmp_path / "adapter"), "--output",
        str(tmp_path / "files"),
    )  # fmt: skip
    merge(model)
    expected, plain = logits(model), logits(base(bases[name]))
    for folder in ("live", "files"):
        loaded = in_peft(base(bases[name]), tmp_path / folder)
        found = logits(loaded)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        torch.testing.assert_close(logits(loaded.merge_and_unload()), expected, rtol=1e-4, atol=1e-4)
    assert (expected - plain).abs().max() > 0.01 * plain.abs().max()
    written = json.loads((tmp_path / "files" / "adapter_config.json").read_text())
    assert written["peft_type"] == kind
    assert report.errors == {}
    for file in ("adapter_config.json", "README.md", "export_report.json"):
        assert (tmp_path / "live" / file).read_text() == (tmp_path / "files" / file).read_text()
    one, other = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("live", "files"))
    assert all(torch.equal(one[key], other[key]) for key in one.keys() | other.keys())


@pytest.mark.parametrize("case", [c for c in CASES if CASES[c][2] != "LORA" and CASES[c][0] != "bert"])
def test_config_and_keys_are_those_that_peft_writes(case: str, bases: dict[str, Path], tmp_path: Path) -> None:
    name, config, _ = CASES[case]
    export_peft(trained(base(bases[name]), config), tmp_path / "ours", progress=False)
    in_peft(base(bases[name]), tmp_path / "ours").save_pretrained(tmp_path / "theirs")

    def content(folder: str) -> dict[str, Any]:
        found = json.loads((tmp_path / folder / "adapter_config.json").read_text())
        return found | {"target_modules": sorted(found["target_modules"])}

    assert content("ours") == content("theirs")
    one, other = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("ours", "theirs"))
    assert all(torch.equal(one[key], other[key]) for key in one.keys() | other.keys())


def test_as_chooses_the_type(bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = trained(base(bases["llama"]), MiSSConfig(rank=8))
    save_adapter(model, tmp_path / "adapter")
    command = ["export", "--format", "peft", "--base", str(bases["llama"]), "--adapter", str(tmp_path / "adapter")]
    for more, kind, says in (
        ([], "MISS", "vLLM reads LoRA only, and no MiSS: export with --as lora, or merge."),
        (["--as", "native"], "MISS", "MiSS of 14 layers (14 of rank 8; exact)"),
        (["--as", "lora"], "LORA", "vLLM needs --max-lora-rank 8."),
        (["--rank", "4"], "LORA", "14 of them cut to it"),
        (["--as", "lora", "--rank", "4"], "LORA", "14 of them cut to it"),
    ):
        run_tool(*command, "--output", str(tmp_path / "out"), "--overwrite", *more)
        assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["peft_type"] == kind
        assert says in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*command, "--output", str(tmp_path / "out2"), "--as", "native", "--rank", "4"])
    assert "rank=4 cuts a LoRA" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, "--output", str(tmp_path / "out2"), "--as", "miss"])
    assert "invalid choice: 'miss'" in capsys.readouterr().err
    export_lora(model, tmp_path / "live", progress=False)
    assert json.loads((tmp_path / "live" / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_the_card_of_a_native_type(bases: dict[str, Path], tmp_path: Path) -> None:
    export_peft(trained(base(bases["llama"]), HiRAConfig(rank=4)), tmp_path / "out", progress=False)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# HiRA adapter of peft's own type" in card
    assert "\n- hira\n" in card
    assert "vLLM reads LoRA only" in card
    assert "vllm serve" not in card


INEXPRESSIBLE: dict[str, tuple[str, Any, str]] = {
    "Conv1D": (
        "gpt2",
        MiSSConfig(rank=8, target_modules="c_attn"),
        r"MiSS takes nn.Linear only, and .*c_attn is a Conv1D",
    ),
    "ranks without a common multiple": (
        "llama",
        MiSSConfig(rank=12, rank_pattern={"q_proj": 31}),
        r"one rank for all layers, and the ranks of this adapter \(12, 31\) have no common multiple up to 32",
    ),
    "PMSS": ("llama", PMSSConfig(rank=8), "peft has no type for the updates of PMSS"),
    "one-sided PMSS": ("llama", PMSSConfig(rank=8, columns="all"), "peft has no type for the updates of PMSS"),
    "LoRA-XS": ("llama", LoRAXSConfig(rank=8), "peft has no type for the updates of LoRAXS"),
    "CURLoRA": ("llama", CURLoRAConfig(rank=8), "peft has no type for the updates of CURLoRA"),
}


@pytest.mark.parametrize("case", INEXPRESSIBLE)
def test_what_no_type_of_peft_expresses_is_an_exact_lora(case: str, bases: dict[str, Path], tmp_path: Path) -> None:
    name, config, message = INEXPRESSIBLE[case]
    model = trained(base(bases[name]), config)
    with pytest.raises(ValueError, match=f"{message}.*Export it as a LoRA instead: --as lora"):
        export_peft(model, tmp_path / "out", native=True, progress=False)
    assert not (tmp_path / "out").exists()
    save_adapter(model, tmp_path / "adapter")
    told: list[str] = []
    export_files(bases[name], tmp_path / "adapter", tmp_path / "out", progress=False, announce=told.append)
    found = logits(in_peft(base(bases[name]), tmp_path / "out"))
    torch.testing.assert_close(found, logits(model), rtol=1e-4, atol=1e-4)
    assert told[0].startswith("LoRA of ")
    assert ("peft's MiSS" in told[0]) == isinstance(config, MiSSConfig)  # the others never have another type


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BATConfig(rank=8, form="row"), "peft has no type for the updates of BAT; and"),
        (BATConfig(rank=7), r"peft's BAT needs a rank that divides both sides of every layer, and that of .* is 7"),
        (
            BATConfig(rank=8, rank_pattern={"q_proj": 4}),
            r"BAT has one rank for all layers, and this adapter has several \(4, 8\)",
        ),
        (HUTConfig(rank=8), "peft has no type for the updates of HUT; and"),
    ],
)
def test_what_neither_expresses_asks_for_a_rank(
    config: Any, message: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    model = trained(base(bases["llama"]), config)
    with pytest.raises(ValueError, match=f"{message}.*so no LoRA is equal to it. Give a rank"):
        export_peft(model, tmp_path / "out", progress=False)
    with pytest.raises(ValueError, match="no product of two thin matrices"):
        export_peft(model, tmp_path / "out", native=False, progress=False)
    assert export_peft(model, tmp_path / "out", rank=4, progress=False).form == "LoRA"


def test_another_base_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    other = base(bases["llama"])
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[3, 5] += 0.1
    save_adapter(trained(other, HiRAConfig(rank=4)), tmp_path / "adapter")
    with pytest.raises(ValueError, match="belongs to another base"):
        export_files(bases["llama"], tmp_path / "adapter", tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_narrow_dtype(bases: dict[str, Path], tmp_path: Path) -> None:
    model = trained(base(bases["llama"]), MiSSConfig(rank=8))
    export_peft(model, tmp_path / "out", dtype="bfloat16", progress=False)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    name, layer = next(iter(adapted_layers(model).items()))
    assert torch.equal(tensors[f"base_model.model.{name}.miss_block"], layer.core.D.to(torch.bfloat16))  # type: ignore[union-attr, operator]
