"""What is promised of a method, asked of all in `METHODS` and their variants. A new method passes these tests as they are.

The reference is the dense weight ``W + delta`` in float64, of updates that are not zero.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_pmss import (
    AdaptedLinear,
    AdapterCallback,
    AdapterConfig,
    convert,
    export_lora,
    load_adapter,
    merge,
    save_adapter,
    unmerge,
)
from lightning_pmss.checkpoints.extract import extract_files
from lightning_pmss.conversion.convert import adapted_layers
from lightning_pmss.files import merge_files, read_adapter
from lightning_pmss.merging import merged_state_dict
from lightning_pmss.methods.method import Kind, file_bytes
from lightning_pmss.named import load_adapters, set_adapter
from tests.callbacks import toys
from tests.callbacks.toys import Numbers, Toy, make_net
from tests.methods.cases import CASES

TARGETS = ["0", "2"]
every_method = pytest.mark.parametrize("method", list(CASES))


def config_of(method: str, **options: Any) -> AdapterConfig:
    return CASES[method](target_modules=TARGETS, rank=4, **options)


def inputs() -> Tensor:
    (x,) = toys.inputs().tensors
    return x


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return make_net().to(dtype)


def train(model: nn.Module, seed: int = 1, size: float = 0.3) -> nn.Module:
    """Give each layer an update of about ``size`` times its weight."""
    generator = torch.Generator().manual_seed(seed)
    for layer in adapted_layers(model).values():
        for tensor in layer.core.trained().values():
            with torch.no_grad():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) / math.sqrt(tensor.shape[-1]))
                for _ in range(60):
                    norm = delta(layer).norm() / layer.base_weight().double().norm()
                    if size / 2 < norm < 2 * size or not bool(norm):
                        break
                    tensor.mul_(1.3 if norm < size else 0.7)
        assert delta(layer).norm() > 1e-3
    return model


def delta(layer: AdaptedLinear) -> Tensor:
    """``W' - W`` in float64, from the update alone."""
    with torch.no_grad():
        return layer.update().delta(layer.base_weight().double(), dtype=torch.float64)


def dense(model: nn.Module) -> nn.Sequential:
    """A plain network with W' in the place of W, float64."""
    plain = net(torch.float64)
    for name, layer in adapted_layers(model).items():
        weight = layer.base_weight().double() + delta(layer)
        plain.get_submodule(name).weight.data.copy_(weight)
    return plain


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_starts_at_the_base_and_is_the_dense_model(method: str, dtype: torch.dtype) -> None:
    model, x = net(dtype), inputs().to(dtype)
    before = model(x)
    report = convert(model, config_of(method))
    assert [layer.name for layer in report.layers] == TARGETS
    torch.testing.assert_close(model(x), before, rtol=1e-6, atol=1e-6)
    train(model)
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(model(x).double(), dense(model)(x.double()), rtol=tolerance, atol=tolerance)
    assert (model(x) - before).abs().max() > 1e-3


@every_method
def test_trains_exactly_its_own_tensors_with_the_gradients_of_the_dense_model(method: str) -> None:
    model, x = net(torch.float64), inputs().double()
    report = convert(model, config_of(method))
    train(model)
    own = {id(t) for layer in adapted_layers(model).values() for t in layer.core.trained().values()}
    assert own == {id(p) for p in model.parameters() if p.requires_grad}
    assert report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    (model(x) - x.flip(-1)).square().mean().backward()
    assert all(p.grad is None for p in model.parameters() if id(p) not in own)
    # The same loss through the definition: W' from the trained tensors.
    layers = adapted_layers(model)
    trained = {
        n: {k: t.detach().clone().requires_grad_() for k, t in x.core.trained().items()} for n, x in layers.items()
    }
    hidden = x
    for name, module in model.named_children():
        if name in layers:
            layer = layers[name]
            tensors = trained[name] | layer.core.frozen() | layer.indices()
            update = layer.method.update_of(tensors, layer.scale)
            weight = layer.base_weight() + update.delta(layer.base_weight())
            hidden = F.linear(hidden, weight, layer.bias)
        else:
            hidden = module(hidden)
    (hidden - x.flip(-1)).square().mean().backward()
    for name, layer in layers.items():
        for key, tensor in layer.core.trained().items():
            assert tensor.grad is not None
            torch.testing.assert_close(tensor.grad, trained[name][key].grad, rtol=1e-8, atol=1e-10)


@every_method
@pytest.mark.parametrize("shape", [(0,), (0, 7), (3, 0)])
def test_zero_tokens(method: str, shape: tuple[int, ...]) -> None:
    model = net()
    convert(model, config_of(method))
    train(model)
    x = torch.zeros(*shape, inputs().shape[-1], requires_grad=True)
    y = model(x)
    assert y.shape[:-1] == shape
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    for layer in adapted_layers(model).values():
        assert all(p.grad is not None and not p.grad.any() for p in layer.core.trained().values())


@every_method
def test_specs_say_what_a_layer_has(method: str) -> None:
    model = net()
    report = convert(model, config_of(method))
    for entry, layer in zip(report.layers, adapted_layers(model).values(), strict=True):
        specs = layer.method.specs(entry.shape, entry.rank)
        assert specs.keys() == layer.tensors().keys()
        for name, tensor in layer.tensors().items():
            assert tuple(tensor.shape) == specs[name].shape
            trained = name in layer.core.trained()
            kind = Kind.INDEX if name in layer.index_names else Kind.TRAINED if trained else Kind.FROZEN
            assert specs[name].kind is kind
        stored = layer.update().stored().tensors().values()
        size = sum(t.nbytes if t.is_floating_point() else 4 * t.numel() for t in stored)
        assert file_bytes(layer.method, entry.shape, entry.rank, torch.float32) == size == entry.file_bytes


@every_method
def test_numbers_are_the_inverse_of_the_update(method: str) -> None:
    model = net(torch.float64)
    convert(model, config_of(method))
    train(model)
    for layer in adapted_layers(model).values():
        before = delta(layer)
        update = layer.update()
        for tensor in layer.core.trained().values():
            tensor.data.normal_()
        layer.set_update(update)
        torch.testing.assert_close(delta(layer), before, rtol=1e-8, atol=1e-10)


@every_method
def test_merge_is_the_dense_model_and_unmerge_is_exact(method: str) -> None:
    model, x = net(), inputs()
    convert(model, config_of(method))
    train(model)
    before = {name: layer.weight.detach().clone() for name, layer in adapted_layers(model).items()}
    expected = dense(model)
    merge(model)
    for name, layer in adapted_layers(model).items():
        torch.testing.assert_close(layer.weight.double(), expected.get_submodule(name).weight, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model(x).double(), expected(x.double()), rtol=1e-4, atol=1e-4)
    unmerge(model)
    assert all(torch.equal(layer.weight, before[name]) for name, layer in adapted_layers(model).items())


@every_method
def test_files_hold_the_update_and_the_streamed_merge_is_the_one_in_memory(method: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model, x = net(), inputs()
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    convert(model, config_of(method))
    train(model)
    save_adapter(model, tmp_path / "adapter")
    stored = read_adapter(tmp_path / "adapter")
    for name, layer in adapted_layers(model).items():
        for part, tensor in layer.update().stored().tensors().items():
            assert torch.equal(stored.modules[name].update.tensors()[part], tensor)
    fresh = net()
    load_adapter(fresh, tmp_path / "adapter")
    torch.testing.assert_close(fresh(x), model(x), rtol=1e-4, atol=1e-5)
    again = net()
    convert(again, config_of(method))
    indices = [t for layer in adapted_layers(again).values() for t in layer.indices().values()]
    if not indices:  # else the indices are those of this selection, which are the same here
        load_adapter(again, tmp_path / "adapter")
        torch.testing.assert_close(again(x), model(x), rtol=1e-4, atol=1e-5)
    merge_files(tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "merged", progress=False)
    streamed, live = load_file(tmp_path / "merged" / "model.safetensors"), merged_state_dict(model)
    assert streamed.keys() == live.keys()
    for key, value in live.items():
        assert torch.equal(streamed[key], value), key


@every_method
def test_another_base_is_refused_where_that_matters(method: str, tmp_path: Path) -> None:
    model = net()
    convert(model, config_of(method))
    train(model)
    save_adapter(model, tmp_path / "adapter")
    other = net()
    with torch.no_grad():
        other[0].weight.mul_(1.5)
    if next(iter(adapted_layers(model).values())).method.update_class.bound_to_base:
        with pytest.raises(ValueError, match="another base|not those|other weights|belongs"):
            load_adapter(other, tmp_path / "adapter")
    else:
        load_adapter(other, tmp_path / "adapter")


@every_method
def test_export_is_the_update_or_says_what_is_lost(method: str, tmp_path: Path, tiny_llama: str) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    convert(model, CASES[method](target_modules=["q_proj", "down_proj"], rank=4))
    train(model)
    layer = next(iter(adapted_layers(model).values()))
    if layer.update().factors(layer.base_weight(), torch.float64) is None:
        with pytest.raises(ValueError, match="no product of two thin matrices"):
            export_lora(model, tmp_path / "lora", progress=False)
        return
    export_lora(model, tmp_path / "lora", progress=False)
    ids = torch.arange(12)[None]
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), str(tmp_path / "lora"))
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-4)
    report = export_lora(model, tmp_path / "cut", rank=2, progress=False)
    card = (tmp_path / "cut" / "README.md").read_text()
    assert f"# LoRA form of a {CASES[method]().label()} adapter" in card
    assert CASES[method]().card() in card
    assert all(0 < error < 1 for error in report.errors.values())


class Fit:
    """A run of the toy, stopped and resumed or not."""

    def __init__(self, method: str, folder: Path) -> None:
        self.method, self.folder = method, folder

    def __call__(self, name: str, steps: int, checkpoint: Path | None = None) -> Toy:
        module = Toy()
        module.lr = 0.002  # no method's factor makes steps of this size diverge
        callback = AdapterCallback(config_of(self.method), output_dir=self.folder / name)
        saved = ModelCheckpoint(self.folder / name, filename="{step}", every_n_train_steps=3, save_top_k=-1)
        trainer = L.Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=False,
            callbacks=[callback, saved],
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, Numbers(), ckpt_path=checkpoint)
        return module


@every_method
def test_a_resumed_run_is_the_run_and_its_checkpoint_holds_the_adapter(method: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    fit = Fit(method, tmp_path)
    whole = fit("whole", 8)
    assert whole.losses[-1] < whole.losses[0]
    checkpoint = tmp_path / "whole" / "step=3.ckpt"
    resumed = fit("resumed", 8, checkpoint)
    assert resumed.losses == whole.losses[3:]
    for file in ("adapter/adapter_model.safetensors", "merged/model.safetensors"):
        one, other = (load_file(tmp_path / name / file) for name in ("whole", "resumed"))
        assert all(torch.equal(one[key], value) for key, value in other.items())
    frozen = {f"net.{name}.weight" for name in TARGETS}
    assert not frozen & set(torch.load(checkpoint)["state_dict"])
    save_file(Toy().state_dict(), tmp_path / "base.safetensors")
    fit("short", 3)
    extract_files(checkpoint, tmp_path / "base.safetensors", tmp_path / "extracted", progress=False)
    one, other = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("short/adapter", "extracted"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], value) for key, value in other.items())


@every_method
def test_checkpoints_of_other_options_are_refused(method: str, tmp_path: Path) -> None:
    fit = Fit(method, tmp_path)
    fit("whole", 3)
    others = [other for other in CASES if other != method]
    with pytest.raises(ValueError, match=r"does not fit this run|lacks|contains no \w+ adapter"):
        Fit(others[0], tmp_path)("other", 6, tmp_path / "whole" / "step=3.ckpt")


@every_method
@pytest.mark.parametrize("kind", ["nf4", "torchao int8"])
def test_quantised_bases(method: str, kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("torchao")
    from tests.core.test_quantised import quantised_linear

    torch.manual_seed(0)
    layer = quantised_linear(kind, 32, 64, True, torch.float32)
    model = nn.Sequential(layer)
    convert(model, CASES[method](target_modules=["0"], rank=4))
    train(model)
    x = torch.randn(5, 64)
    found = adapted_layers(model)["0"]
    weight = found.base_weight().double() + delta(found)
    expected = F.linear(x.double(), weight, layer.bias.double())
    torch.testing.assert_close(model(x).double(), expected, rtol=2e-2, atol=2e-2)
    model(x).square().sum().backward()
    assert all(t.grad is not None and bool(t.grad.isfinite().all()) for t in found.core.trained().values())


@every_method
def test_several_adapters_on_one_base(method: str, tmp_path: Path) -> None:
    x, expected = inputs(), {}
    for seed, rank in ((1, 4), (2, 3)):
        model = net()
        convert(model, CASES[method](target_modules=TARGETS, rank=rank))
        train(model, seed)
        save_adapter(model, tmp_path / str(seed))
        expected[str(seed)] = model(x)
    model = net()
    load_adapters(model, {name: tmp_path / name for name in expected})
    for name in ("1", "2", "1"):
        set_adapter(model, name)
        torch.testing.assert_close(model(x), expected[name], rtol=1e-4, atol=1e-4)


@every_method
def test_compiles_once(method: str) -> None:
    model, x = net(), inputs()
    convert(model, config_of(method))
    train(model)
    expected = model(x)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
        for layer in adapted_layers(compiled).values():
            for tensor in layer.core.trained().values():
                tensor.data.mul_(1.1)
        compiled(x)


@every_method
def test_bfloat16_is_near_float32(method: str) -> None:
    model, x = net(), inputs()
    convert(model, config_of(method))
    train(model)
    low = copy.deepcopy(model).to(torch.bfloat16)
    for layer in adapted_layers(low).values():
        assert all(t.dtype == torch.float32 for t in layer.core.trained().values())
    found, expected = low(x.to(torch.bfloat16)), model(x)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() < 0.05 * expected.norm()
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(x).float() - expected).norm() < 0.05 * expected.norm()
