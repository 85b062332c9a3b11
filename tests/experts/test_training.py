"""Training mixtures: precision, checkpointing, idle experts, resuming, checkpoints, averages, two processes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from safetensors.torch import load_file

from lightning_pmss import LoRAConfig, PMSSConfig, convert, load_adapter
from lightning_pmss.callbacks import FlatLoRA
from lightning_pmss.checkpoints.extract import extract_files
from lightning_pmss.conversion.convert import adapted_layers
from lightning_pmss.named import disable_adapter
from tests.experts.toys import MIXTURES, mixture, tokens, train
from tests.experts.training import Mixture, batches, fit
from tests.methods.cases import CASES
from tests.small_runs import two_runs


def step(model: Any) -> dict[str, torch.Tensor]:
    """Gradients by name after one backward pass."""
    model.zero_grad()
    ids = tokens()
    model(ids, labels=ids).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("method", ["lora", "pmss", "pmss columns=all", "miss", "bat"])
@pytest.mark.parametrize("name", list(MIXTURES))
def test_gradient_checkpointing_gives_the_same_gradients(name: str, method: str) -> None:
    model = mixture(name).train()
    convert(model, CASES[method](rank=4))
    train(model)
    wanted = step(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for key, gradient in step(model).items():
        torch.testing.assert_close(gradient, wanted[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("how", ["true", "autocast"])
@pytest.mark.parametrize("method", list(CASES))
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_bfloat16_is_near_float32(name: str, method: str, how: str) -> None:
    """Where all experts are asked, so that rounding changes no choice."""
    size = 0.02 if method.startswith("pmss") else 0.3  # of which the scale makes much more
    models = [train(made(name, method), size=size) for _ in range(2)]
    wanted = step(models[0])
    if how == "true":
        models[1].bfloat16()
        found = step(models[1])
    else:
        with torch.autocast("cpu", torch.bfloat16):
            found = step(models[1])
    assert found.keys() == wanted.keys()
    for key, gradient in found.items():
        assert gradient.dtype == torch.float32, key
        assert torch.dist(gradient, wanted[key]) < 0.15 * wanted[key].norm() + 1e-4, key


def made(name: str, method: str) -> Any:
    """Experts alone are converted; every token asks all of them."""
    model = mixture(name, num_experts_per_tok=4)
    options: dict[str, Any] = {"target_modules": [], "target_parameters": ["gate_up_proj", "down_proj"]}
    convert(model, CASES[method](rank=4, **options))
    return model


def test_a_small_update_is_not_rounded_away_in_bfloat16() -> None:
    model = made("mixtral", "lora")
    train(model, size=1e-3)
    model.bfloat16()
    gradients = step(model)
    ups = [g for n, g in gradients.items() if "gate_up_proj_adapter.core.A" in n]
    assert all(bool(g.any()) for g in ups)
    before = [p.clone() for p in model.parameters() if p.requires_grad]
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3).step()
    assert any(
        not torch.equal(a, b) for a, b in zip(before, (p for p in model.parameters() if p.requires_grad), strict=True)
    )


@pytest.mark.parametrize("method", ["lora", "pmss", "pmss columns=all", "lora_xs", "hira"])
def test_resuming_equals_never_having_stopped(method: str, tmp_path: Path) -> None:
    def run(folder: Path, checkpoint: Path | None) -> Mixture:
        module = Mixture("mixtral" if method != "pmss" else "gpt_oss")
        saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=4, save_top_k=-1)  # of an epoch
        fit(folder, module, CASES[method](rank=4), saver, checkpoint=checkpoint, loader=batches(4))
        return module

    whole = run(tmp_path, None)
    assert whole.losses[-1] != whole.losses[0]
    saved = torch.load(tmp_path / "step=4.ckpt", weights_only=False)["state_dict"]
    assert not any(key.endswith(("experts.gate_up_proj", "experts.down_proj")) for key in saved)
    again = run(tmp_path / "again", tmp_path / "step=4.ckpt")
    assert again.losses == whole.losses[4:]
    for name, layer in adapted_layers(whole).items():
        for part, tensor in adapted_layers(again)[name].tensors().items():
            assert torch.equal(tensor, layer.tensors()[part]), (name, part)


@pytest.mark.parametrize("method", ["pmss", "pmss columns=all"])
def test_indices_of_a_checkpoint_replace_those_selected_now(method: str, tmp_path: Path) -> None:
    """Coordinates follow them, too."""
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1)
    whole, again = Mixture(), Mixture()
    fit(tmp_path, whole, CASES[method](rank=4), saver, loader=batches(4))
    other = CASES[method](rank=4, selection="random", seed=1)
    fit(tmp_path / "again", again, other, checkpoint=tmp_path / "step=4.ckpt", loader=batches(4))
    assert again.losses == pytest.approx(whole.losses[4:], rel=1e-5)


@pytest.mark.parametrize("method", ["lora", "pmss", "pmss columns=all"])
def test_the_results_of_a_run_and_of_its_checkpoint(method: str, tmp_path: Path) -> None:
    mixture("qwen3_moe").save_pretrained(tmp_path / "base")

    class FromDisk(Mixture):
        def __init__(self) -> None:
            super().__init__("qwen3_moe")
            self.model = type(self.model).from_pretrained(tmp_path / "base")

    module = FromDisk()
    saver = ModelCheckpoint(tmp_path / "saved", "{step}", every_n_train_steps=8, save_top_k=-1)
    fit(tmp_path, module, CASES[method](rank=4), saver, merge="end")
    wanted = module.model(tokens()).logits
    for folder in ("extracted", "out/adapter"):
        if folder == "extracted":
            extract_files(tmp_path / "saved" / "step=8.ckpt", tmp_path / "base", tmp_path / folder, progress=False)
        again = FromDisk().model
        load_adapter(again, tmp_path / folder)
        torch.testing.assert_close(again(tokens()).logits, wanted, rtol=1e-4, atol=1e-5)
    merged = type(module.model).from_pretrained(tmp_path / "out" / "merged")
    torch.testing.assert_close(merged(tokens()).logits, wanted, rtol=1e-3, atol=1e-4)
    fresh = load_file(tmp_path / "extracted" / "adapter_model.safetensors")
    own = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(value, own[key]) for key, value in fresh.items())


def test_idle_experts_are_reported_and_not_refused(tmp_path: Path) -> None:
    """Two tokens ask two of the four experts each."""
    module = Mixture("qwen3_moe")
    with pytest.warns(
        UserWarning, match=r"got a gradient of zero, since no token reached these experts.*experts\.gate_up"
    ):
        fit(tmp_path, module, LoRAConfig(rank=4), max_steps=1, loader=batches(length=2, size=1))
    layers = adapted_layers(module)
    idle = [name for name, layer in layers.items() if not layer.ran()]
    assert idle
    assert all(".experts." in name for name in idle)
    for name in idle:
        assert not layers[name].core.trained()["B"].any()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no token reached.*")
        fit(tmp_path / "more", Mixture("qwen3_moe"), LoRAConfig(rank=4), max_steps=1, loader=batches(length=64, size=4))


def test_averages_and_disabling(tmp_path: Path) -> None:
    module = Mixture()
    fit(tmp_path, module, PMSSConfig(rank=4), EMAWeightAveraging(decay=0.5), merge=None)
    plain = mixture("mixtral")
    trained = module.model(tokens()).logits
    with disable_adapter(module):
        torch.testing.assert_close(module.model(tokens()).logits, plain(tokens()).logits)
    torch.testing.assert_close(module.model(tokens()).logits, trained)
    again = mixture("mixtral")
    load_adapter(again, tmp_path / "out" / "adapter")
    torch.testing.assert_close(again(tokens()).logits, trained, rtol=1e-4, atol=1e-5)


class WithMuon(Mixture):
    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad and p.dim() == 2]
        others = [p for p in self.parameters() if p.requires_grad and p.dim() != 2]
        return [torch.optim.Muon(trained, lr=0.01), torch.optim.SGD(others, lr=0.01)]

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise AssertionError("refused before")


def test_what_is_not_there_for_experts_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"FlatLoRA gives no noise to fused experts.*exclude_modules=\['experts'\]"):
        fit(tmp_path, Mixture(), LoRAConfig(rank=4), FlatLoRA())
    with pytest.raises(Exception, match=r"Muon orthogonalises matrices.*stacked.*exclude_modules=\['experts'\]"):
        fit(tmp_path / "muon", WithMuon(), LoRAConfig(rank=4))


@pytest.mark.distributed
def test_two_processes_with_experts_idle_on_one(tmp_path: Path) -> None:
    first, second = two_runs("tests.experts.training", tmp_path)
    assert first["ran"] != second["ran"]  # some experts had tokens on one rank only
    assert (tmp_path / "whole" / "out" / "adapter" / "adapter_model.safetensors").is_file()
