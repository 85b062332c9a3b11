"""Adapters that others made wider than a layer, and adapters of several forms of one method."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_pmss import BATConfig, LoRAConfig, PMSSConfig, convert, load_adapter, save_adapter
from lightning_pmss.conversion.convert import adapted_layers
from lightning_pmss.files import read_adapter
from lightning_pmss.files.lora_import import import_files
from lightning_pmss.methods.config import AdapterConfig
from lightning_pmss.named import add_adapter, combine_adapters, combine_files, load_adapters, set_adapter
from tests.files.test_peft_import import made

peft = pytest.importorskip("peft")
X = torch.randn(7, 16, generator=torch.Generator().manual_seed(5))


def net(out: int = 6) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, out))


def write(folder: Path, config: AdapterConfig, seed: int, model: nn.Module | None = None) -> Path:
    model = net() if model is None else model
    convert(model, config)
    generator = torch.Generator().manual_seed(seed)
    for layer in adapted_layers(model).values():
        for value in layer.core.trained().values():
            value.data = 0.3 * torch.randn(value.shape, generator=generator)
    save_adapter(model, folder)
    return folder


def alone(folder: Path, out: int = 6) -> Tensor:
    model = net(out)
    load_adapter(model, folder)
    return model(X).detach()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    save_file(net().state_dict(), tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text("{}")
    return tmp_path / "base"


def test_a_sum_wider_than_a_layer(base: Path, tmp_path: Path) -> None:
    """Of ranks 4 and 4 on a layer with 6 outputs: it has rank 6 at most, and is held so."""
    folders = [write(tmp_path / name, LoRAConfig(rank=4), seed) for seed, name in enumerate("ab")]
    combine_files(base, folders, tmp_path / "sum", rule="cat", progress=False)
    stored = read_adapter(tmp_path / "sum")
    assert {name: module.update.width for name, module in stored.modules.items()} == {"0": 8, "2": 6}
    own, parts = net(), [read_adapter(folder) for folder in folders]
    for name, layer in (("0", own[0]), ("2", own[2])):
        layer.weight.data += sum(part.modules[name].update.delta(layer.weight.data) for part in parts)
    torch.testing.assert_close(alone(tmp_path / "sum"), own(X).detach(), rtol=1e-4, atol=1e-5)
    model = net()
    load_adapters(model, {"sum": tmp_path / "sum", "a": folders[0]})
    torch.testing.assert_close(model(X).detach(), own(X).detach(), rtol=1e-4, atol=1e-5)
    again = net()
    for _ in range(2):  # the second time into a model that is converted already
        load_adapter(again, tmp_path / "sum")


@pytest.mark.parametrize("kind", ["LoRA", "HiRA"])
def test_a_folder_of_peft_wider_than_a_layer(kind: str, base: Path, tmp_path: Path) -> None:
    config = {"LoRA": peft.LoraConfig, "HiRA": peft.HiraConfig}[kind](r=8, target_modules=["0", "2"])
    expected = made(net(), tmp_path / "theirs", config)(X).detach()
    import_files(tmp_path / "theirs", base, tmp_path / "ours")
    model = net()
    load_adapters(model, {"a": tmp_path / "ours"})
    assert (expected - net()(X)).abs().max() > 0.02
    for found in (model(X).detach(), alone(tmp_path / "ours")):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_sum_of_named_ones_wider_than_a_layer(tmp_path: Path) -> None:
    folders = {name: write(tmp_path / name, LoRAConfig(rank=10), seed, net(16)) for seed, name in enumerate("ab")}
    model = net(16)
    load_adapters(model, folders)
    with pytest.raises(ValueError, match=r"has rank 16 in .*more than these layers have here.*rank=16\)\.$"):
        combine_adapters(model, "sum", {"a": 0.5, "b": -1.0})
    model, own = net(16), net(16)
    load_adapters(model, folders, rank=16)  # as it says
    combine_adapters(model, "sum", {"a": 0.5, "b": -1.0})
    set_adapter(model, "sum")
    for name, layer in (("0", own[0]), ("2", own[2])):
        for weight, folder in zip((0.5, -1.0), folders.values(), strict=True):
            layer.weight.data += weight * read_adapter(folder).modules[name].update.delta(
                net(16)[int(name)].weight.data
            )
    torch.testing.assert_close(model(X).detach(), own(X).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (BATConfig(rank=4), BATConfig(rank=4, form="row")),
        (PMSSConfig(rank=4), PMSSConfig(rank=4, columns="all")),
    ],
    ids=["BAT", "PMSS"],
)
def test_forms_are_not_mixed(one: AdapterConfig, other: AdapterConfig, tmp_path: Path) -> None:
    folders = {name: write(tmp_path / name, config, 1, net(16)) for name, config in (("a", one), ("b", other))}
    for order in ("ab", "ba"):
        model = net(16)
        with pytest.raises(ValueError, match="the adapters `a`, `b` are of several forms of"):
            load_adapters(model, {name: folders[name] for name in order})
        first, second = order
        load_adapters(model, {first: folders[first]})
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match="is of another form of"):
            add_adapter(model, second, folders[second])
        torch.testing.assert_close(model(X).detach(), alone(folders[first], 16), rtol=1e-4, atol=1e-5)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("rule", [{"rule": "linear"}, {"rule": "ties", "density": 0.5}])
def test_entry_rules_are_pefts_for_adapters_of_several_alphas(rule: Any, base: Path, tmp_path: Path) -> None:
    config = {
        name: peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=["0"]) for name, alpha in (("a", 32), ("b", 4))
    }
    model = peft.get_peft_model(net(), config["a"], "a")
    model.add_adapter("b", config["b"])
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(tmp_path / "theirs", selected_adapters=["a", "b"])
    for name in "ab":
        import_files(tmp_path / "theirs" / name, base, tmp_path / name)
    more = {key: value for key, value in rule.items() if key != "rule"}
    model.add_weighted_adapter(["a", "b"], [1.0, -0.5], "all", rule["rule"], **more)
    expected = model.base_model.model[0].get_delta_weight("all")
    combine_files(base, [tmp_path / "a", tmp_path / "b"], tmp_path / "c", weights=[1.0, -0.5], progress=False, **rule)
    found = read_adapter(tmp_path / "c").modules["0"].update.delta(torch.zeros(16, 16))
    assert expected.norm() > 0.1
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-5)
