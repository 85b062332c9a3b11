"""Adapter files of fused experts, and merging them into the base's own layout on disk, as transformers then loads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lightning_pmss import AdapterConfig, convert, load_adapter, merge, save_adapter, unmerge
from lightning_pmss.conversion.convert import adapted_layers
from lightning_pmss.estimate import Run, estimate
from lightning_pmss.files import merge_files, read_adapter, write_merged
from lightning_pmss.files.select import select_files
from lightning_pmss.inspect.inspection import inspect_adapter
from lightning_pmss.merging import merged_state_dict
from tests.experts.toys import MIXTURES, mixture, tokens, train
from tests.methods.cases import CASES

every_method = pytest.mark.parametrize("method", list(CASES))
every_mixture = pytest.mark.parametrize("name", list(MIXTURES))


def config_of(method: str, **options: Any) -> AdapterConfig:
    return CASES[method](**{"rank": 4} | options)


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def trained(name: str, method: str, folder: Path) -> Any:
    """A model that was read from a base on disk, with an adapter that is not zero."""
    mixture(name).save_pretrained(folder)
    model = plain(folder)
    convert(model, config_of(method))
    return train(model)


@every_method
@every_mixture
def test_saved_loaded_and_merged_on_disk(name: str, method: str, tmp_path: Path) -> None:
    model = trained(name, method, tmp_path / "base")
    wanted = model(tokens()).logits
    save_adapter(model, tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter")
    assert "model.layers.1.mlp.experts.down_proj.3" in adapter.modules
    assert set(adapter.modules) == set(adapted_layers(model))

    again = plain(tmp_path / "base")
    load_adapter(again, tmp_path / "adapter")
    torch.testing.assert_close(again(tokens()).logits, wanted, rtol=1e-4, atol=1e-5)
    for layer in adapted_layers(model).values():
        for tensor in layer.core.trained().values():
            with torch.no_grad():
                tensor.zero_()
    load_adapter(model, tmp_path / "adapter")
    torch.testing.assert_close(model(tokens()).logits, wanted, rtol=1e-4, atol=1e-5)

    report = merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", progress=False)
    assert set(report.merged) == set(adapter.modules)
    torch.testing.assert_close(plain(tmp_path / "merged")(tokens()).logits, wanted, rtol=1e-3, atol=1e-4)
    base, merged = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "merged"))
    assert {k: v.shape for k, v in base.items()} == {k: v.shape for k, v in merged.items()}
    assert all(not torch.equal(base[k], v) for k, v in merged.items() if ".experts." in k and "bias" not in k)

    write_merged(model, tmp_path / "live")
    live = load_file(tmp_path / "live" / "model.safetensors")
    assert live.keys() == merged.keys()
    for key, value in live.items():
        torch.testing.assert_close(value, merged[key], rtol=1e-5, atol=1e-6)
    model.save_pretrained(tmp_path / "own")
    torch.testing.assert_close(plain(tmp_path / "own")(tokens()).logits, wanted, rtol=1e-3, atol=1e-4)
    fresh = mixture(name)
    fresh.load_state_dict(merged_state_dict(model))
    torch.testing.assert_close(fresh(tokens()).logits, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["pmss", "pmss columns=all", "lora_xs"])
@pytest.mark.parametrize("name", list(MIXTURES))
def test_a_skeleton_file_has_what_a_conversion_derives(name: str, method: str, tmp_path: Path) -> None:
    mixture(name).save_pretrained(tmp_path / "base")
    report = select_files(tmp_path / "base", tmp_path / "file.safetensors", config_of(method), progress=False)
    direct, model = plain(tmp_path / "base"), plain(tmp_path / "base")
    convert(direct, config_of(method))
    convert(model, config_of(method, skeleton_file=tmp_path / "file.safetensors"))
    layers = adapted_layers(model)
    assert {layer.name for layer in report.layers} == set(layers)
    for key, layer in adapted_layers(direct).items():
        for part, tensor in layer.tensors().items():
            torch.testing.assert_close(layers[key].tensors()[part], tensor, msg=f"{key}.{part}")
    other = mixture(name, seed=4)
    with pytest.raises(ValueError, match=r"belongs to another base model"):
        convert(other, config_of(method, skeleton_file=tmp_path / "file.safetensors"))


def test_another_base_is_refused(tmp_path: Path) -> None:
    save_adapter(trained("gpt_oss", "pmss", tmp_path / "base"), tmp_path / "adapter")
    other = mixture("gpt_oss", seed=3)
    with pytest.raises(ValueError, match=r"belongs to another base"):
        load_adapter(other, tmp_path / "adapter")
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"belongs to another base"):
        merge_files(tmp_path / "other", tmp_path / "adapter", tmp_path / "merged", progress=False)


@pytest.mark.parametrize("name", list(MIXTURES))
def test_inspect_and_estimate(name: str, tmp_path: Path) -> None:
    save_adapter(trained(name, "lora", tmp_path / "base"), tmp_path / "adapter")
    found = inspect_adapter(tmp_path / "adapter", tmp_path / "base")
    assert any(layer.name == "model.layers.1.mlp.experts.down_proj.3" for layer in found.layers)
    run = Run(str(tmp_path / "base"), config=config_of("lora"), micro_batch=2, sequence_length=16)
    made = estimate(run, ("lora",))
    model = plain(tmp_path / "base")
    assert made.methods["lora"].trainable == convert(model, config_of("lora")).trainable


def test_state_dicts_while_merged(tmp_path: Path) -> None:
    """They hold the base's weights and the adapter, and what is loaded is merged again."""
    model = trained("gpt_oss", "pmss", tmp_path / "base")
    before, wanted = {k: v.clone() for k, v in model.state_dict().items()}, model(tokens()).logits
    merge(model)
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in before.items())
    halved = {k: v / 2 if "core.weight" in k else v for k, v in before.items()}
    model.load_state_dict(halved)
    merged = model(tokens()).logits
    assert not torch.allclose(merged, wanted, atol=1e-3)
    unmerge(model)
    torch.testing.assert_close(model(tokens()).logits, merged, rtol=1e-3, atol=1e-4)
    model.load_state_dict(before)
    torch.testing.assert_close(model(tokens()).logits, wanted)


def test_experts_that_were_left_out_are_recorded_by_parameter(tmp_path: Path) -> None:
    """Also where others of their kind were converted."""
    mixture("qwen3_moe").save_pretrained(tmp_path / "base")
    model = plain(tmp_path / "base")
    convert(model, config_of("lora", exclude_modules=["layers.0.mlp.experts", "layers.1.mlp.experts.gate_up_proj"]))
    train(model)
    save_adapter(model, tmp_path / "adapter")
    experts = "model.layers.{}.mlp.experts.{}"
    left_out = [name for name in read_adapter(tmp_path / "adapter").left_out or () if "experts" in name]
    assert left_out == [
        experts.format(0, "gate_up_proj"),
        experts.format(0, "down_proj"),
        experts.format(1, "gate_up_proj"),
    ]
    again = plain(tmp_path / "base")
    load_adapter(again, tmp_path / "adapter")
    assert adapted_layers(again).keys() == adapted_layers(model).keys()
    torch.testing.assert_close(again(tokens()).logits, model(tokens()).logits)
    deeper = mixture("qwen3_moe", num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"its options select other layers in this model|belongs to another base"):
        load_adapter(deeper, tmp_path / "adapter")
