"""Adapter files of parameters that are no weights of linear layers, and what reads them: merge, select, combine, inspect."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lightning_pmss import convert, export_lora, load_adapter, save_adapter
from lightning_pmss.conversion.convert import adapted_layers
from lightning_pmss.estimate import Run, estimate
from lightning_pmss.files import merge_files, read_adapter, write_merged
from lightning_pmss.files.lora import export_files
from lightning_pmss.files.select import select_files
from lightning_pmss.inspect.inspection import inspect_adapter
from lightning_pmss.named import add_adapter, combine_adapters, combine_files, load_adapters, set_adapter
from tests.experts.toys import MIXTURES, mixture, tokens, train
from tests.matrices.toys import TOYS, inputs, made, matrices
from tests.methods.cases import CASES

every_method = pytest.mark.parametrize("method", list(CASES))
OWN = [name for name in TOYS if name not in MIXTURES]
ROUTERS = {"mixtral": "gate", "qwen3_moe": "gate", "gpt_oss": "router", "deepseek": "gate"}
X = inputs(torch.float32)


def converted(name: str, method: str, **options: Any) -> Any:
    model = made(name, torch.float32)
    settings = {"target_modules": [], "target_parameters": TOYS[name].patterns, "rank": 3}
    convert(model, CASES[method](**settings | options))
    return train(model)


@every_method
@pytest.mark.parametrize("name", OWN)
def test_saved_loaded_and_merged(name: str, method: str, tmp_path: Path) -> None:
    model = converted(name, method)
    wanted = model(X)
    save_adapter(model, tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter")
    assert set(adapter.modules) == set(TOYS[name].names)
    assert {module.layout for module in adapter.modules.values()} == {"parameter"}
    again = made(name, torch.float32)
    load_adapter(again, tmp_path / "adapter")
    torch.testing.assert_close(again(X), wanted, rtol=1e-3, atol=1e-4)
    load_adapter(model, tmp_path / "adapter")
    torch.testing.assert_close(model(X), wanted, rtol=1e-3, atol=1e-4)

    save_file(made(name, torch.float32).state_dict(), tmp_path / "base.safetensors")
    report = merge_files(tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "merged", progress=False)
    assert set(report.merged) == set(TOYS[name].names)
    write_merged(model, tmp_path / "live")
    on_disk, live = (load_file(tmp_path / folder / "model.safetensors") for folder in ("merged", "live"))
    fresh = made(name, torch.float32, seed=4)
    fresh.load_state_dict(on_disk)
    torch.testing.assert_close(fresh(X), wanted, rtol=1e-3, atol=1e-4)
    for key, value in live.items():
        torch.testing.assert_close(value, on_disk[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["lora", "pmss", "hira"])
@pytest.mark.parametrize("name", list(MIXTURES))
def test_routers_beside_experts_and_attention(name: str, method: str, tmp_path: Path) -> None:
    """Saved, loaded, merged on disk as the base keeps them, and read by transformers."""
    mixture(name).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    parameters = ["down_proj", f"{ROUTERS[name]}.weight"]
    convert(model, CASES[method](rank=3, target_modules=["o_proj"], target_parameters=parameters))
    train(model)
    assert matrices(model)
    wanted = model(tokens()).logits
    save_adapter(model, tmp_path / "adapter")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    load_adapter(again, tmp_path / "adapter")
    torch.testing.assert_close(again(tokens()).logits, wanted, rtol=1e-4, atol=1e-5)
    merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", progress=False)
    model.save_pretrained(tmp_path / "own")
    for folder in ("merged", "own"):
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        torch.testing.assert_close(plain(tokens()).logits, wanted, rtol=1e-3, atol=1e-4)
    base, merged = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "merged"))
    assert {k: v.shape for k, v in base.items()} == {k: v.shape for k, v in merged.items()}
    assert any(not torch.equal(base[k], v) for k, v in merged.items() if k.endswith(f".{ROUTERS[name]}.weight"))
    found = inspect_adapter(tmp_path / "adapter", tmp_path / "base")
    assert any(layer.name.endswith(f"{ROUTERS[name]}.weight") for layer in found.layers)
    run = Run(
        str(tmp_path / "base"),
        config=CASES[method](rank=3, target_parameters=parameters),
        micro_batch=2,
        sequence_length=16,
    )
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    trainable = convert(fresh, CASES[method](rank=3, target_parameters=parameters)).trainable
    assert estimate(run, (run.config.method,)).methods[run.config.method].trainable == trainable


@pytest.mark.parametrize("method", ["pmss", "pmss columns=all", "lora_xs"])
@pytest.mark.parametrize("name", list(MIXTURES))
def test_a_skeleton_file_has_what_a_conversion_derives(name: str, method: str, tmp_path: Path) -> None:
    mixture(name).save_pretrained(tmp_path / "base")
    options = {"rank": 3, "target_modules": ["o_proj"], "target_parameters": [f"{ROUTERS[name]}.weight"]}
    select_files(tmp_path / "base", tmp_path / "file.safetensors", CASES[method](**options), progress=False)
    direct, model = (AutoModelForCausalLM.from_pretrained(tmp_path / "base") for _ in range(2))
    convert(direct, CASES[method](**options))
    convert(model, CASES[method](**options, skeleton_file=tmp_path / "file.safetensors"))
    layers = adapted_layers(model)
    assert matrices(model)
    for key, layer in adapted_layers(direct).items():
        for part, tensor in layer.tensors().items():
            torch.testing.assert_close(layers[key].tensors()[part], tensor, msg=f"{key}.{part}")


@every_method
def test_several_adapters_on_one_base(method: str, tmp_path: Path) -> None:
    wanted = {}
    for seed, (name, rank) in enumerate((("a", 3), ("b", 2 if "mini_rank" not in method else 3))):
        model = converted("encoder", method, rank=rank, target_modules=["linear1"])
        train(model, seed=seed + 1)
        save_adapter(model, tmp_path / name)
        wanted[name] = model(X).detach()
    model = made("encoder", torch.float32)
    load_adapters(model, {"a": tmp_path / "a"}, rank=6)
    add_adapter(model, "b", tmp_path / "b")
    for name in "baba":
        set_adapter(model, name)
        torch.testing.assert_close(model(X), wanted[name], rtol=1e-3, atol=1e-4)
    if method in ("lora", "pmss"):
        combine_adapters(model, "sum", {"a": 1.0, "b": 1.0})
        set_adapter(model, "sum")
        changes = {n: x.update().delta(x.base_weight()) for n, x in matrices(model).items()}
        for name in "ab":
            set_adapter(model, name)
            changes = {
                n: value - matrices(model)[n].update().delta(matrices(model)[n].base_weight())
                for n, value in changes.items()
            }
        assert all(float(value.detach().abs().max()) < 1e-5 for value in changes.values())


def test_combined_on_disk(tmp_path: Path) -> None:
    folders, changes = [], []
    for seed, method in enumerate(("lora", "pmss")):
        model = converted("attention", method)
        train(model, seed=seed)
        save_adapter(model, tmp_path / method)
        folders.append(tmp_path / method)
        layer = matrices(model)["attention.in_proj_weight"]
        changes.append(layer.update().delta(layer.base_weight()).detach())
    save_file(made("attention", torch.float32).state_dict(), tmp_path / "base.safetensors")
    combine_files(tmp_path / "base.safetensors", folders, tmp_path / "sum", rule="cat", progress=False)
    assert read_adapter(tmp_path / "sum").options.target_parameters == ["attention.in_proj_weight"]
    model = made("attention", torch.float32)
    load_adapter(model, tmp_path / "sum")
    layer = matrices(model)["attention.in_proj_weight"]
    torch.testing.assert_close(layer.update().delta(layer.base_weight()), sum(changes), rtol=1e-4, atol=1e-5)


def test_an_export_is_refused_by_name(tmp_path: Path) -> None:
    model = converted("attention", "lora")
    with pytest.raises(
        ValueError, match=r"attention\.in_proj_weight is a parameter of a module that is no linear layer.*Merge instead"
    ):
        export_lora(model, tmp_path / "lora")
    save_adapter(model, tmp_path / "adapter")
    (tmp_path / "base").mkdir()
    save_file(made("attention", torch.float32).state_dict(), tmp_path / "base" / "model.safetensors")
    for format in ("peft", "vllm"):
        with pytest.raises(ValueError, match=r"no form of it for peft or vLLM has been tried"):
            export_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "lora", format=format, progress=False)
    assert not (tmp_path / "lora").exists()


def test_another_base_and_a_deeper_model_are_refused(tmp_path: Path) -> None:
    save_adapter(converted("encoder", "pmss"), tmp_path / "adapter")
    with pytest.raises(ValueError, match="belongs to another base"):
        load_adapter(made("encoder", torch.float32, seed=3), tmp_path / "adapter")
    save_file(made("encoder", torch.float32, seed=3).state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="belongs to another base"):
        merge_files(tmp_path / "other.safetensors", tmp_path / "adapter", tmp_path / "merged", progress=False)
    deeper = made("encoder", torch.float32)
    deeper.encoder.layers.append(copy.deepcopy(deeper.encoder.layers[0]))  # type: ignore[union-attr, operator]
    with pytest.raises(ValueError, match=r"select other layers in this model.*layers\.2\.self_attn\.in_proj_weight"):
        load_adapter(deeper, tmp_path / "adapter")
    save_adapter(
        converted("encoder", "lora", target_parameters=["layers.0.self_attn.in_proj_weight"]), tmp_path / "one"
    )
    assert "encoder.layers.1.self_attn.in_proj_weight" in (read_adapter(tmp_path / "one").left_out or ())
    load_adapter(made("encoder", torch.float32), tmp_path / "one")
    with pytest.raises(ValueError, match="layers that the model does not have"):
        load_adapter(made("attention", torch.float32), tmp_path / "one")


@pytest.mark.parametrize("method", ["lora", "pmss", "bat"])
@pytest.mark.parametrize("name", OWN)
def test_copies_pickles_casts_and_state_dicts(name: str, method: str) -> None:
    model = converted(name, method)
    wanted, state = model(X), {k: v.clone() for k, v in model.state_dict().items()}
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        torch.testing.assert_close(other(X), wanted)
        with torch.no_grad():
            for layer in matrices(other).values():
                for tensor in layer.core.trained().values():
                    tensor.zero_()
        assert not torch.allclose(other(X), wanted)
        other.load_state_dict(state)
        torch.testing.assert_close(other(X), wanted)
    torch.testing.assert_close(model(X), wanted)
    model.bfloat16()
    assert {t.dtype for x in matrices(model).values() for t in x.core.trained().values()} == {torch.float32}
    assert torch.dist(model(X.bfloat16()).float(), wanted) < 0.1 * wanted.norm()


def test_state_dicts_while_merged() -> None:
    """They hold the base's weights and the adapter, and what is loaded is merged again."""
    from lightning_pmss import merge, unmerge

    model = converted("attention", "pmss")
    before, wanted = {k: v.clone() for k, v in model.state_dict().items()}, model(X)
    merge(model)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    model.load_state_dict({k: v / 2 if "core.weight" in k else v for k, v in before.items()})
    half = model(X)
    assert not torch.allclose(half, wanted, atol=1e-3)
    unmerge(model)
    torch.testing.assert_close(model(X), half, rtol=1e-3, atol=1e-4)
    model.load_state_dict(before)
    torch.testing.assert_close(model(X), wanted)
