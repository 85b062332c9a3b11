"""HiRA against its formula and against peft's; what its layer keeps, and which bases it takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM

from lightning_pmss import BATConfig, HiRAConfig, HUTConfig, convert, export_lora, load_adapter, save_adapter
from lightning_pmss.cli.tools import run_tool
from lightning_pmss.conversion.convert import adapted_layers
from lightning_pmss.files.lora import export_files
from tests.methods.dense import TARGETS, is_dense, layers, trained


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_the_layer_is_the_formula(scale: float) -> None:
    is_dense(
        HiRAConfig(target_modules=TARGETS, rank=3, scale=scale),
        lambda weight, core: weight * (1 + scale * (core.B @ core.A)),
    )


def test_pefts_factors_give_pefts_output_and_gradients(tiny_llama: str) -> None:
    peft = pytest.importorskip("peft")
    options: dict[str, Any] = {"target_modules": ["q_proj", "down_proj"]}
    rival = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), peft.HiraConfig(r=4, **options))
    ours = AutoModelForCausalLM.from_pretrained(tiny_llama)
    convert(ours, HiRAConfig(rank=4, **options))
    theirs = {n: p for n, p in rival.named_parameters() if p.requires_grad}
    for name, layer in adapted_layers(ours).items():
        for side, own in layer.core.trained().items():
            value = theirs[f"base_model.model.{name}.hira_{side}.default"]
            assert value.shape == own.shape
            with torch.no_grad():
                value.normal_()
                own.copy_(value)
    ids = torch.arange(12)[None]
    found, expected = (model(input_ids=ids, labels=ids) for model in (ours, rival))
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(tiny_llama)(ids).logits
    assert (found.logits - base).abs().max() > 0.01
    found.loss.backward()
    expected.loss.backward()
    for name, layer in adapted_layers(ours).items():
        for side, own in layer.core.trained().items():
            gradient = theirs[f"base_model.model.{name}.hira_{side}.default"].grad
            torch.testing.assert_close(own.grad, gradient, rtol=1e-3, atol=1e-6)


def test_no_matrix_of_the_weights_size_is_kept_for_the_backward_pass() -> None:
    model = layers()
    converted = trained(model, HiRAConfig(target_modules=TARGETS, rank=2))
    own = {layer.weight.untyped_storage().data_ptr() for layer in converted}
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.randn(1, 12, dtype=torch.float64, requires_grad=True))
    others = [t for t in kept if t.untyped_storage().data_ptr() not in own]
    assert others
    assert all(t.numel() < 6 * 12 for t in others)


def test_a_change_that_a_bfloat16_weight_cannot_hold_reaches_the_output() -> None:
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False)).to(torch.bfloat16)
    model[0].weight.data.normal_(generator=generator)
    x = torch.randn(256, 64, generator=generator).to(torch.bfloat16)
    convert(model, HiRAConfig(target_modules=["0"], rank=1))
    layer: Any = adapted_layers(model)["0"]
    layer.core.A.data = torch.randn(1, 64, generator=generator).sign()
    layer.core.B.data = 1.5e-3 * torch.randn(64, 1, generator=generator).sign()
    with torch.no_grad():
        change = layer.update().delta(layer.weight.float(), dtype=torch.float32)
        assert torch.equal((layer.weight.float() + change).to(torch.bfloat16), layer.weight)
        found, expected = model(x).float() - layer.base(x).float(), x.float() @ change.T
    assert float((found * expected).sum() / (found.norm() * expected.norm())) > 0.5


def test_a_base_of_which_one_number_differs_is_refused(tmp_path: Path) -> None:
    model = layers(torch.float32)
    trained(model, HiRAConfig(target_modules=TARGETS, rank=2))
    save_adapter(model, tmp_path / "adapter")
    other = layers(torch.float32)
    with torch.no_grad():
        other[1].weight[3, 7] += 0.01
    with pytest.raises(ValueError, match="belongs to another base.*an adapter of HiRA means nothing"):
        load_adapter(other, tmp_path / "adapter")


@pytest.mark.parametrize("config", [HiRAConfig, HUTConfig, BATConfig])
def test_the_nearest_lora_of_a_rank_and_its_loss(config: Any, tiny_llama: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    trained(model, config(target_modules=["q_proj", "down_proj"], rank=4))
    save_adapter(model, tmp_path / "adapter")
    ids = torch.arange(12)[None]
    for rank, exact in ((8, False), (1024, True)):
        report = export_lora(model, tmp_path / str(rank), rank=rank, progress=False)
        base = AutoModelForCausalLM.from_pretrained(tiny_llama)
        loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / str(rank)))
        if exact:  # the rank of the smaller side
            torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-4)
            assert not report.errors
        for name, layer in adapted_layers(model).items():
            found = loaded.get_submodule(f"base_model.model.{name}").get_delta_weight("default").double()
            change = layer.update().delta(layer.base_weight(), dtype=torch.float64)
            lost = torch.linalg.svdvals(change)[rank:].norm() / change.norm()
            assert float((found - change).norm() / change.norm()) == pytest.approx(float(lost), rel=1e-3, abs=1e-5)
            assert report.errors.get(name, 0.0) == pytest.approx(float(lost), rel=1e-6)
    files = export_files(tiny_llama, tmp_path / "adapter", tmp_path / "files", rank=8, progress=False)
    assert files.errors == pytest.approx(json.loads((tmp_path / "8" / "export_report.json").read_text())["errors"])
    run_tool("inspect", str(tmp_path / "adapter"), "--base", tiny_llama)


def test_a_factor_with_which_nothing_can_be_trained() -> None:
    with pytest.raises(ValueError, match="scale=0 must be finite and not zero"):
        HiRAConfig(scale=0)
