"""`FlatLoRA`: noise of the right size on the merged weight in both passes, of one draw a step, and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_pmss import AdapterCallback, LoRAConfig, MiSSConfig, PMSSCallback, PMSSConfig, convert
from lightning_pmss.callbacks import FlatLoRA
from lightning_pmss.callbacks.flat_lora import StepNoise
from lightning_pmss.conversion.convert import adapted_layers
from lightning_pmss.layers.weight_noise import NoiseProduct, draw, merged_row_norms, seed_of
from tests.callbacks.toys import EXAMPLES, Numbers, Toy, inputs, plain_loader, trainer

STEPS = 18


def trained_layer(config: Any, out: int = 64, inp: int = 48, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inp, out, dtype=dtype))
    convert(model, config)
    (layer,) = adapted_layers(model).values()
    with torch.no_grad():
        for value in layer.core.trained().values():
            value.normal_(std=0.3)
    return layer


@pytest.mark.parametrize("config", [PMSSConfig(rank=8), LoRAConfig(rank=4), MiSSConfig(rank=6)])
def test_rows_of_the_noise_are_as_large_as_those_of_the_merged_weight(config: Any) -> None:
    layer = trained_layer(config, out=40, inp=4000)
    merged = layer.weight.detach() + layer.update().delta(layer.weight.detach()).detach()
    norms = merged_row_norms(layer)
    torch.testing.assert_close(norms.double(), merged.norm(dim=1), rtol=1e-5, atol=0)
    noise = draw(0.05 / math.sqrt(4000) * norms, 4000, seed_of(1), torch.float64)
    ratio = noise.norm(dim=1) / merged.norm(dim=1)
    assert float((ratio - 0.05).abs().max()) < 0.05 * 5 / math.sqrt(2 * 4000)  # five standard errors


def test_both_passes_have_one_noise() -> None:
    std = torch.rand(5)
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    y = NoiseProduct.apply(x, std, 11)
    noise = draw(std, 3, 11, torch.float64)
    torch.testing.assert_close(y, x @ noise.T)
    grad = torch.randn_like(y)
    y.backward(grad)
    torch.testing.assert_close(x.grad, grad @ noise)


def _disturbed(layer: Any, strength: float = 0.5) -> StepNoise:
    noise = StepNoise()
    noise.disturb(layer, "0")
    noise.begin(strength, (0, 1, 0))
    return noise


@pytest.mark.parametrize("way", ["checkpoint", "compile", "bfloat16"])
def test_recomputed_compiled_and_in_bfloat16(way: str) -> None:
    layer = trained_layer(PMSSConfig(rank=8), dtype=torch.float32)
    noise = _disturbed(layer)
    x = torch.randn(9, 48)

    def gradients(call: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        own = x.clone().requires_grad_()
        y = call(own)
        (got,) = torch.autograd.grad(y.square().sum(), layer.core.weight, retain_graph=True)
        (of_x,) = torch.autograd.grad(y.square().sum(), own)
        return y.detach(), got, of_x

    expected = gradients(layer)
    std = noise.norms["0"] * 0.5 / math.sqrt(48)
    dense = layer.weight.detach() + layer.update().delta(layer.weight.detach()).detach()
    dense = dense + draw(std, 48, seed_of(0, 1, 0, "0"), torch.float32)
    torch.testing.assert_close(expected[0], x @ dense.T + layer.bias)
    if way == "bfloat16":
        with torch.autocast("cpu", torch.bfloat16):
            found = gradients(layer)
        for a, b in zip(expected, found, strict=True):
            assert 1e-6 < float((a - b).norm() / a.norm()) < 0.2  # the same draw, rounded
        return
    call = (
        torch.compile(layer, backend="eager")
        if way == "compile"
        else lambda x: checkpoint(layer, x, use_reentrant=False)
    )
    for a, b in zip(expected, gradients(call), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["nf4", "torchao int8"])
def test_quantised_bases_keep_their_codes(kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("torchao")
    from tests.core.test_quantised import quantised_linear

    torch.manual_seed(0)
    model = nn.Sequential(quantised_linear(kind, 32, 64, True, torch.float32))
    convert(model, PMSSConfig(target_modules=["0"], rank=4))
    (layer,) = adapted_layers(model).values()
    with torch.no_grad():
        layer.core.weight.normal_(std=0.3)
    x, dense = torch.randn(5, 64), layer.base_weight().float()
    clean = layer(x)
    noise = _disturbed(layer)
    found = layer(x)
    merged = (dense + layer.update().delta(dense)).detach()
    std = 0.5 / math.sqrt(64) * merged.norm(dim=1)
    torch.testing.assert_close(noise.norms["0"] * 0.5 / math.sqrt(64), std, rtol=1e-4, atol=1e-6)
    expected = x @ draw(std, 64, seed_of(0, 1, 0, "0"), torch.float32).T
    torch.testing.assert_close(found - clean, expected, rtol=1e-3, atol=1e-3)
    found.square().sum().backward()
    assert torch.equal(layer.base_weight().float(), dense)


class Watching(Toy):
    """Records the noise of each pass: what the first layer adds to the merged weight, by a batch of unit vectors."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.net = self.net.to(dtype)
        self.seen: list[tuple[str, int, Tensor]] = []

    def look(self, where: str) -> None:
        layer = self.net[0]
        with torch.no_grad():
            found = layer(torch.eye(16, dtype=layer.weight.dtype)).float()
            weight = layer.weight.float()
            clean = (weight + layer.update().delta(weight)).T + layer.bias.float()
        self.seen.append((where, self.trainer.global_step, found - clean))

    def loss(self, batch: Any) -> Tensor:
        (x,) = batch
        return super().loss([x.to(self.net[0].weight.dtype)]).float()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.look("train")
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, *args: Any) -> None:
        self.look("between")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.look("validation")


def test_one_draw_a_step_and_none_elsewhere(tmp_path: Path) -> None:
    module = Watching()
    run = trainer(
        tmp_path,
        PMSSCallback(rank=6, merge_on_save=None),
        FlatLoRA(sigma=0.5),
        accumulate_grad_batches=2,
        val_check_interval=3,
    )
    run.fit(module, Numbers())
    quiet = [noise for where, _, noise in module.seen if where != "train"]
    assert len(quiet) > STEPS
    assert all(float(noise.abs().max()) < 1e-5 for noise in quiet)
    by_step: dict[int, list[Tensor]] = {}
    for where, step, noise in module.seen:
        if where == "train":
            by_step.setdefault(step, []).append(noise)
    steps = run.global_step
    assert {len(noises) for noises in by_step.values()} == {2}
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in by_step.values())
    sizes = [float(noises[0].norm()) for noises in by_step.values()]
    assert sizes[0] < 1e-5 < sizes[1]
    assert sizes == sorted(sizes)
    expected = 0.5 * 0.5 * (1 - math.cos(math.pi * (steps - 1) / steps)) * float(merged_row_norms(module.net[0]).norm())
    assert sizes[-1] == pytest.approx(expected, rel=0.15)  # five standard errors of 512 numbers
    drawn = [noises[0] / noises[0].norm() for noises in list(by_step.values())[1:]]
    assert max(float((a * b).sum().abs()) for a, b in zip(drawn, drawn[1:], strict=False)) < 0.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_and_global_random_state_are_untouched(tmp_path: Path, dtype: torch.dtype) -> None:
    found = []
    for more in ([], [FlatLoRA(sigma=0.5)]):
        torch.manual_seed(1)
        module = Watching(dtype)
        before = {name: p.detach().clone() for name, p in module.net.named_parameters()}
        callback = PMSSCallback(rank=6, dropout=0.3, output_dir=tmp_path / str(len(more)), merge_on_save=None)
        trainer(tmp_path, callback, *more).fit(module, Numbers())
        now = dict(module.net.named_parameters())
        assert all(torch.equal(now[name], value) for name, value in before.items())
        found.append(
            (torch.get_rng_state(), load_file(tmp_path / str(len(more)) / "adapter" / "adapter_model.safetensors"))
        )
    (state, plain), (same, noisy) = found
    assert torch.equal(state, same)
    assert any(not torch.equal(plain[name], noisy[name]) for name in plain if name.endswith(".U"))


def test_a_resumed_run_continues_inside_a_step(tmp_path: Path) -> None:
    class Saving(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.fit_loop.total_batch_idx == 6:
                trainer.save_checkpoint(tmp_path / "inside.ckpt")

    def run(checkpoint: Path | None, noise: bool = True) -> list[float]:
        torch.manual_seed(1 if checkpoint is None else 2)
        module = Toy()
        more = [FlatLoRA(sigma=0.5)] if noise else []
        pmss = PMSSCallback(rank=6, dropout=0.3, output_dir=tmp_path / "out", merge_on_save=None)
        trainer(tmp_path, pmss, *more, Saving(), accumulate_grad_batches=2).fit(module, Numbers(), ckpt_path=checkpoint)
        return module.losses

    whole = run(None)
    assert run(tmp_path / "inside.ckpt") == whole[7:]
    assert run(tmp_path / "inside.ckpt", noise=False) != whole[7:]


def test_an_exception_leaves_no_noise(tmp_path: Path) -> None:
    class Failing(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            if self.trainer.global_step == 4:
                raise RuntimeError("out of luck")
            return loss

    module = Failing()
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer(tmp_path, PMSSCallback(rank=6, merge_on_save=None), FlatLoRA(sigma=0.5)).fit(module, Numbers())
    assert not module.net[0]._forward_hooks
    assert not module.net[0]._forward_pre_hooks


def test_refusals(tmp_path: Path) -> None:
    for sigma in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"FlatLoRA: sigma=.* must be a positive number, such as 0\.05"):
            FlatLoRA(sigma=sigma)
    with pytest.raises(ValueError, match=r"FlatLoRA: no layer of the model is converted.*Add AdapterCallback"):
        trainer(tmp_path, None, FlatLoRA()).fit(Toy(), plain_loader())

    class Endless(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            while True:
                yield from inputs(EXAMPLES)

    endless = torch.utils.data.DataLoader(Endless(), batch_size=4)
    lora = AdapterCallback(LoRAConfig(rank=2), merge_on_save=None)
    run = trainer(tmp_path, lora, FlatLoRA(), max_epochs=-1, max_time="00:00:00:20")
    with pytest.raises(ValueError, match="the number of optimizer steps is not known.*Set max_steps"):
        run.fit(Toy(), endless)
