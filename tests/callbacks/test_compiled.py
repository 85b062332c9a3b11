"""Modules with compiled or wrapped parts: names, checkpoints, adapters and merged models are those of the plain one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lightning_pmss import PMSSCallback, PMSSConfig, convert, load_adapter, save_adapter
from lightning_pmss.conversion.convert import adapted_layers
from lightning_pmss.files import write_merged
from lightning_pmss.layers.parts import clean_name, clean_state, own_keys
from lightning_pmss.merging import merged_state_dict
from tests.callbacks.toys import Numbers, Toy, inputs, make_net, trainer

compiled: Callable[[Any], Any] = functools.partial(torch.compile, backend="eager")  # names need no C++ compiler


def whole(module: Toy) -> None:
    module.net = compiled(module.net)


def parts(module: Toy) -> None:
    module.net[0], module.net[2] = compiled(module.net[0]), checkpoint_wrapper(module.net[2])


def nested(module: Toy) -> None:
    module.net[2] = compiled(module.net[2])
    module.net = compiled(checkpoint_wrapper(module.net))


def in_place(module: Toy) -> None:
    module.net.compile(backend="eager")


def beside(module: Toy) -> None:
    module.fast = compiled(module.net)


WAYS = [whole, parts, nested, in_place, beside]


def toy(way: Callable[[Toy], None] | None) -> Toy:
    module = Toy()
    if way is not None:
        way(module)
    return module


def fit(folder: Path, module: Toy, checkpoint: Path | None = None, **options: Any) -> Toy:
    torch.manual_seed(1)
    callback = PMSSCallback(rank=6, also_train=["net.2"], output_dir=folder / "out", **options)
    saver = ModelCheckpoint(folder / "saved", "{epoch}", save_top_k=-1)
    runner = trainer(folder, callback, saver, EMAWeightAveraging(decay=0.8))
    runner.fit(module, Numbers(), ckpt_path=checkpoint)
    return module


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Toy]:
    folder = tmp_path_factory.mktemp("plain")
    return folder, fit(folder, toy(None), merge_on_save="checkpoint")


@pytest.mark.parametrize("way", WAYS)
def test_files_are_those_of_the_plain_module(tmp_path: Path, plain: tuple[Path, Toy], way: Any) -> None:
    folder, reference = plain
    module = fit(tmp_path, toy(way), merge_on_save="checkpoint")
    assert module.losses == reference.losses
    ours, theirs = (torch.load(f / "saved" / "epoch=1.ckpt") for f in (tmp_path, folder))
    for part in ("state_dict", "current_model_state"):
        assert set(ours[part]) == set(theirs[part])
    for name in ("out/adapter/adapter_model.safetensors", "out/merged/model.safetensors"):
        ours, theirs = load_file(tmp_path / name), load_file(folder / name)
        if way is not beside:
            assert set(ours) == set(theirs)
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value, rtol=1e-5, atol=1e-6)
    assert (tmp_path / "saved" / "epoch=1-merged" / "model.safetensors").is_file()
    fresh = Toy()
    load_adapter(fresh, tmp_path / "out" / "adapter")
    torch.testing.assert_close(fresh.net(inputs().tensors[0]), reference.net(inputs().tensors[0]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("back", [False, True])
def test_checkpoints_go_on_in_the_other_form(tmp_path: Path, plain: tuple[Path, Toy], way: Any, back: bool) -> None:
    folder, reference = plain
    if back:
        folder = tmp_path / "compiled"
        fit(folder, toy(way))
    module = fit(tmp_path, toy(None if back else way), folder / "saved" / "epoch=1.ckpt")
    assert module.losses == reference.losses[-len(module.losses) :]
    for ours, theirs in zip(adapted_layers(module).values(), adapted_layers(reference).values(), strict=True):
        assert torch.equal(ours.core.weight, theirs.core.weight)


class Compiled(Toy):
    def __init__(self) -> None:
        super().__init__()
        nested(self)


def test_load_from_checkpoint_and_extract(tmp_path: Path, plain: tuple[Path, Toy]) -> None:
    folder, reference = plain
    fit(tmp_path, Compiled())
    x = inputs().tensors[0]
    expected = None
    for made_by, cls in ((folder, Compiled), (tmp_path, Toy), (tmp_path, Compiled), (folder, Toy)):
        module = cls.load_from_checkpoint(made_by / "saved" / "epoch=2.ckpt")
        expected = module.net(x) if expected is None else expected
        torch.testing.assert_close(module.net(x), expected)
    torch.testing.assert_close(reference.net(x), expected)


@pytest.mark.parametrize("way", WAYS[:4])
def test_without_a_trainer(tmp_path: Path, way: Any) -> None:
    net, reference, x = toy(way).net, make_net(), inputs().tensors[0]
    convert(net, PMSSConfig(rank=4, target_modules=["0"], also_train=["2"]))
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter)
    save_adapter(net, tmp_path / "adapter")
    reference.load_state_dict(merged_state_dict(net))
    torch.testing.assert_close(reference(x), net(x), rtol=1e-4, atol=1e-4)
    for fresh in (make_net(), compiled(make_net())):
        load_adapter(fresh, tmp_path / "adapter")
        torch.testing.assert_close(fresh(x), net(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("part", ["model", "model.layers.0"])
def test_folders_of_a_hugging_face_model_with_a_compiled_part(tmp_path: Path, tiny_llama: str, part: str) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    parent, _, name = part.rpartition(".")
    setattr(model.get_submodule(parent), name, compiled(model.get_submodule(part)))
    convert(model, PMSSConfig(rank=4))
    for layer in adapted_layers(model).values():
        nn.init.normal_(layer.core.weight, std=0.3)
    ids = torch.arange(12)[None]
    expected = model(ids).logits
    assert not torch.allclose(AutoModelForCausalLM.from_pretrained(tiny_llama)(ids).logits, expected, atol=1e-2)
    write_merged(model, tmp_path / "merged")
    model.save_pretrained(tmp_path / "saved")
    save_adapter(model, tmp_path / "adapter")
    fresh = AutoModelForCausalLM.from_pretrained(tiny_llama)
    load_adapter(fresh, tmp_path / "adapter")
    read = [AutoModelForCausalLM.from_pretrained(tmp_path / folder) for folder in ("merged", "saved")]
    for other in (fresh, *read):
        torch.testing.assert_close(other(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_names() -> None:
    for name, clean in {
        "net._orig_mod.0.weight": "net.0.weight",
        "_orig_mod": "",
        "_fsdp_wrapped_module.a._checkpoint_wrapped_module._orig_mod.b": "a.b",
        "my_orig_mod.weight": "my_orig_mod.weight",
    }.items():
        assert clean_name(name) == clean
    net = compiled(make_net())
    assert set(clean_state(net)) == set(make_net().state_dict())
    assert not net.load_state_dict(own_keys(net, make_net().state_dict())).missing_keys


def test_messages_name_modules_as_the_user_does(tmp_path: Path) -> None:
    class Unfrozen(Toy):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            dict(self.named_parameters())["net._orig_mod.2.bias"].requires_grad_(True)
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Unfrozen()
    whole(module)
    with pytest.raises(MisconfigurationException, match=r"only U should: `net\.2\.bias`"):
        trainer(tmp_path, PMSSCallback(rank=4, output_dir=tmp_path)).fit(module, Numbers())
