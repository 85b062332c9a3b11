"""MiSS, Bone and BAT of peft as adapters of ours, and back as a LoRA that peft loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lightning_pmss import BATConfig, MiSSConfig, convert, export_lora, load_adapter, merge, save_adapter
from lightning_pmss.cli.tools import run_tool
from lightning_pmss.conversion.convert import adapted_layers
from lightning_pmss.files import read_adapter
from lightning_pmss.files.lora import export_files
from lightning_pmss.files.lora_import import import_files
from lightning_pmss.inspect.inspection import inspect_adapter

peft = pytest.importorskip("peft")
TARGETS = ["q_proj", "k_proj", "down_proj"]
IDS = torch.arange(12)[None]


def peft_folder(base: str, folder: Path, **options: Any) -> Any:
    """A folder of a trained MiSS, and the model."""
    config = peft.MissConfig(**({"r": 8, "target_modules": TARGETS, "miss_dropout": 0.1} | options))
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)
    return model


def as_bone(folder: Path) -> None:
    """What peft 0.14 to 0.18 called the same."""
    config = folder / "adapter_config.json"
    content = {k: v for k, v in json.loads(config.read_text()).items() if k not in ("miss_dropout", "mini_r")}
    config.write_text(json.dumps(content | {"peft_type": "BONE"}))
    weights = folder / "adapter_model.safetensors"
    save_file({k.replace(".miss_", ".bone_"): v for k, v in load_file(weights).items()}, weights, {"format": "pt"})


@pytest.mark.parametrize("bone", [False, True])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, MiSSConfig(rank=8, dropout=0.1)),
        ({"r": 12, "modules_to_save": ["norm"]}, MiSSConfig(rank=12, dropout=0.1)),
        ({"init_weights": "mini", "mini_r": 4}, MiSSConfig(rank=8, mini_rank=4, dropout=0.1)),
        ({"init_weights": "bat"}, BATConfig(rank=8)),
    ],
)
def test_a_folder_of_peft_becomes_ours(
    tiny_llama: str, tmp_path: Path, options: dict[str, Any], expected: Any, bone: bool
) -> None:
    if bone and options.get("init_weights") == "mini":
        pytest.skip("Bone had no mini form")
    model = peft_folder(tiny_llama, tmp_path / "peft", **options)
    if bone:
        as_bone(tmp_path / "peft")
    run_tool(
        "import", "--format", "peft", "--input", str(tmp_path / "peft"), "--base", tiny_llama, "--output",
        str(tmp_path / "ours"),
    )  # fmt: skip
    found = read_adapter(tmp_path / "ours").options
    assert (type(found), found.rank, found.meaning()) == (type(expected), expected.rank, expected.meaning())
    if isinstance(found, MiSSConfig):
        assert found.dropout == (0.0 if bone else 0.1)
    loaded = AutoModelForCausalLM.from_pretrained(tiny_llama)
    load_adapter(loaded, tmp_path / "ours")
    loaded.eval()
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)
    merge(loaded)
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)


def test_refusals(tiny_llama: str, tmp_path: Path) -> None:
    peft_folder(tiny_llama, tmp_path / "peft")
    config = tmp_path / "peft" / "adapter_config.json"
    content = json.loads(config.read_text())
    for changed, message in (
        ({"bias": "all"}, "has bias=all, which MiSS here cannot express"),
        ({"init_weights": "bat"}, r"is \[8, 32\], not blocks of r x r, as init_weights"),
        ({"init_weights": "other"}, "init_weights"),
        ({"peft_type": "LOHA"}, "peft_type"),
    ):
        config.write_text(json.dumps(content | changed))
        with pytest.raises(ValueError, match=message):
            import_files(tmp_path / "peft", tiny_llama, tmp_path / "ours")
    config.write_text(json.dumps(content))
    weights = tmp_path / "peft" / "adapter_model.safetensors"
    tensors = load_file(weights)
    key = next(iter(tensors))
    for broken, message in (
        ({k: v for k, v in tensors.items() if k != key} | {f"{key}.more": tensors[key]}, "is not a tensor of MiSS"),
        (tensors | {key: tensors[key][:, :5].contiguous()}, "columns that divides"),
        (tensors | {key: tensors[key] * float("nan")}, "NaN or infinite"),
        (tensors | {key.replace("layers.0", "layers.7"): tensors[key].clone()}, "has no weights for"),
    ):
        save_file(broken, weights, {"format": "pt"})
        with pytest.raises(ValueError, match=message):
            import_files(tmp_path / "peft", tiny_llama, tmp_path / "ours")
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="not a complete adapter folder of peft"):
        import_files(tmp_path / "peft", tiny_llama, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_an_imported_bat_is_bound_to_its_base(tiny_llama: str, tmp_path: Path) -> None:
    peft_folder(tiny_llama, tmp_path / "peft", init_weights="bat")
    import_files(tmp_path / "peft", tiny_llama, tmp_path / "ours")
    other = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight[3, 5] += 0.1
    with pytest.raises(ValueError, match="belongs to another base"):
        load_adapter(other, tmp_path / "ours")


@pytest.mark.parametrize("config", [MiSSConfig(rank=12), MiSSConfig(rank=8, mini_rank=4)])
def test_miss_exports_exactly(tiny_llama: str, tmp_path: Path, config: MiSSConfig) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    convert(model, config)
    for layer in adapted_layers(model).values():
        torch.nn.init.normal_(layer.core.D, std=0.1)  # type: ignore[arg-type]
    assert export_lora(model, tmp_path / "lora", progress=False).errors == {}
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), str(tmp_path / "lora"))
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["column", "row"])
def test_bat_exports_as_the_nearest_lora_with_what_is_lost(tiny_llama: str, tmp_path: Path, form: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    convert(model, BATConfig(target_modules=TARGETS, rank=8, form=form))
    changes = {}
    for name, layer in adapted_layers(model).items():
        torch.nn.init.normal_(layer.core.B, std=0.1)  # type: ignore[arg-type]
        with torch.no_grad():
            weight = layer.base_weight().double()
            changes[name] = layer.update().delta(weight, dtype=torch.float64)
    save_adapter(model, tmp_path / "adapter")
    whole = export_files(tiny_llama, tmp_path / "adapter", tmp_path / "whole", rank=32, progress=False)
    assert {layer.rank for layer in whole.layers} == {16, 32}
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), str(tmp_path / "whole"))
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)
    cut = export_lora(model, tmp_path / "cut", rank=3, progress=False)
    tensors = load_file(tmp_path / "cut" / "adapter_model.safetensors")
    spectra = {layer.name: layer for layer in inspect_adapter(tmp_path / "adapter", tiny_llama).layers}
    for name, change in changes.items():
        a, b = (tensors[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
        singular = torch.linalg.svdvals(change)
        lost = float(singular[3:].norm() / singular.norm())
        assert cut.errors[name] == pytest.approx(lost, rel=1e-6)
        assert float((b @ a - change).norm() / change.norm()) == pytest.approx(lost, rel=1e-5)
        assert spectra[name].singular_values == pytest.approx(singular.tolist(), rel=1e-4, abs=1e-6)
        assert spectra[name].skeleton_energy is None
