"""Adapter files of convolutions and embeddings, their merge on disk, state dicts, several adapters, skeletons, reports."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_pmss import convert, load_adapter, merge, save_adapter, unmerge
from lightning_pmss.conversion.convert import adapted_layers
from lightning_pmss.files import merge_files, read_adapter, write_merged
from lightning_pmss.inspect.inspection import inspect_adapter
from lightning_pmss.merging import merged_state_dict
from lightning_pmss.named import combine_files, disable_adapter, load_adapters, set_adapter
from tests.applied.toys import config_of, net, targets, train
from tests.methods.cases import CASES

every_method = pytest.mark.parametrize("method", list(CASES))


def ids() -> Tensor:
    return torch.randint(0, 23, (3, 9), generator=torch.Generator().manual_seed(2))


def trained(method: str, seed: int = 1, **options: Any) -> Any:
    model = net()
    convert(model, config_of(method, *targets(method), **options))
    return train(model, seed)


@every_method
def test_saved_loaded_and_merged_on_disk(method: str, tmp_path: Path) -> None:
    save_file(net().state_dict(), tmp_path / "base.safetensors")
    model = trained(method)
    wanted = model(ids())
    save_adapter(model, tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter")
    layouts = {"embed": "embedding", "along": "convolution", "image": "convolution", "head": "linear"}
    assert {name: str(module.layout) for name, module in adapter.modules.items()} == {
        name: layouts[name] for name in targets(method)
    }

    again = net()
    load_adapter(again, tmp_path / "adapter")
    torch.testing.assert_close(again(ids()), wanted, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            for tensor in layer.core.trained().values():
                tensor.zero_()
    load_adapter(model, tmp_path / "adapter")
    torch.testing.assert_close(model(ids()), wanted, rtol=1e-4, atol=1e-5)

    base = tmp_path / "base.safetensors"
    report = merge_files(base, tmp_path / "adapter", tmp_path / "merged", progress=False)
    assert set(report.merged) == set(targets(method))
    streamed, plain = load_file(tmp_path / "merged" / "model.safetensors"), net()
    plain.load_state_dict(streamed)
    torch.testing.assert_close(plain(ids()), wanted, rtol=1e-4, atol=1e-5)
    live = merged_state_dict(model)
    assert live.keys() == streamed.keys()
    write_merged(model, tmp_path / "live")
    written = load_file(tmp_path / "live" / "model.safetensors")
    for key, value in live.items():
        torch.testing.assert_close(streamed[key], value, rtol=1e-6, atol=1e-7)
        assert torch.equal(written[key], value)
    inspected = inspect_adapter(tmp_path / "adapter", base)
    assert [layer.name for layer in inspected.layers] == targets(method)


@every_method
def test_state_dicts_while_merged_copies_and_pickles(method: str) -> None:
    model = trained(method)
    before, wanted = {k: v.clone() for k, v in model.state_dict().items()}, model(ids())
    merge(model)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    model.load_state_dict(before)
    torch.testing.assert_close(model.eval()(ids()), wanted, rtol=1e-4, atol=1e-5)
    unmerge(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        assert torch.equal(other(ids()), model(ids()))
    fresh = net()
    convert(fresh, config_of(method, *targets(method)))
    fresh.load_state_dict(before)
    torch.testing.assert_close(fresh(ids()), wanted)


@every_method
def test_several_adapters_on_one_base(method: str, tmp_path: Path) -> None:
    expected = {}
    for name, seed, rank in (("a", 1, 4), ("b", 2, 3)):
        model = trained(method, seed, rank=rank)
        save_adapter(model, tmp_path / name)
        expected[name] = model(ids())
    model = net()
    load_adapters(model, {name: tmp_path / name for name in expected})
    for name in ("a", "b", "a"):
        set_adapter(model, name)
        torch.testing.assert_close(model(ids()), expected[name], rtol=1e-4, atol=1e-4)
    with disable_adapter(model):
        assert torch.equal(model(ids()), net()(ids()))


@pytest.mark.parametrize("name", ["along", "embed"])
def test_another_base_is_refused(name: str, tmp_path: Path) -> None:
    save_adapter(trained("pmss"), tmp_path / "adapter")
    other = net()
    with torch.no_grad():
        other.get_parameter(f"{name}.weight").mul_(1.5)
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=rf"belongs to another base: the weights of {name} "):
        merge_files(tmp_path / "other.safetensors", tmp_path / "adapter", tmp_path / "merged", progress=False)
    with pytest.raises(ValueError, match=rf"belongs to another base: the weights of {name} "):
        load_adapter(other, tmp_path / "adapter")


def test_a_base_of_other_shapes_is_refused(tmp_path: Path) -> None:
    save_adapter(trained("lora"), tmp_path / "adapter")
    state = net().state_dict()
    state["along.weight"] = state["along.weight"][..., :2].clone()
    save_file(state, tmp_path / "other.safetensors")
    wanted = r"along.weight is stored as \[16, 8, 2\].*a convolution \[16, ...\] of 24 numbers for each output"
    with pytest.raises(ValueError, match=wanted):
        merge_files(tmp_path / "other.safetensors", tmp_path / "adapter", tmp_path / "merged", progress=False)


def test_a_layout_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    save_adapter(trained("lora"), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    content = json.loads(file.read_text())
    content["modules"]["along"]["layout"] = "conv9d"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="layout"):
        read_adapter(tmp_path / "adapter")


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@every_method
def test_other_memory_formats(method: str, memory_format: torch.memory_format, tmp_path: Path) -> None:
    """A weight of channels_last has no flat view; it is read and written by its numbers."""
    model = net()
    model.image.to(memory_format=memory_format)
    convert(model, config_of(method, "image"))
    train(model)
    wanted = model(ids())
    save_adapter(model, tmp_path / "adapter")
    merge(model)
    torch.testing.assert_close(model.eval()(ids()), wanted, rtol=1e-4, atol=1e-5)
    plain = net()
    load_adapter(plain, tmp_path / "adapter")
    torch.testing.assert_close(plain(ids()), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "pmss", "miss"])
def test_two_adapters_are_combined_on_disk(method: str, tmp_path: Path) -> None:
    """A weighted sum is the sum of the changes."""
    save_file(net().state_dict(), tmp_path / "base.safetensors")
    models = [trained(method, seed) for seed in (1, 2)]
    for name, model in zip("ab", models, strict=True):
        save_adapter(model, tmp_path / name)
    folders = [tmp_path / name for name in "ab"]
    combine_files(
        tmp_path / "base.safetensors", folders, tmp_path / "sum", rule="cat", weights=[0.5, 2.0], progress=False
    )
    both = net()
    load_adapter(both, tmp_path / "sum")
    found = adapted_layers(both)
    for name in targets(method):
        changes = [adapted_layers(m)[name].update().delta(found[name].base_weight()) for m in models]
        wanted = 0.5 * changes[0] + 2 * changes[1]
        torch.testing.assert_close(found[name].update().delta(found[name].base_weight()), wanted, rtol=1e-4, atol=1e-5)
