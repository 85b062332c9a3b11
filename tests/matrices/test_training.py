"""Fits with converted parameters: exact resume, checkpoints, averages, two processes, torch.compile, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_pmss import HiRAConfig, LoRAConfig, PMSSConfig, convert, load_adapter
from lightning_pmss.callbacks.flat_lora import FlatLoRA
from lightning_pmss.checkpoints.extract import extract_files
from lightning_pmss.named import disable_adapter
from tests import forks
from tests.experts.toys import train
from tests.matrices.toys import D, inputs, made, matrices
from tests.matrices.training import Training, batches, config_of, fit
from tests.small_runs import two_runs

X = inputs(torch.float32)
OWN = ("attention", "encoder", "lstm", "twice")


@pytest.mark.parametrize(("name", "kind"), [*((name, PMSSConfig) for name in OWN), ("encoder", HiRAConfig)])
def test_resuming_equals_never_having_stopped(name: str, kind: Any, tmp_path: Path) -> None:
    def run(folder: Path, checkpoint: Path | None) -> Training:
        module = Training(name)
        saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=4, save_top_k=-1)
        fit(folder, module, config_of(name, kind), saver, checkpoint=checkpoint, loader=batches(4))
        return module

    whole = run(tmp_path, None)
    assert whole.losses[-1] != whole.losses[0]
    saved = torch.load(tmp_path / "step=4.ckpt", weights_only=False)["state_dict"]
    assert saved
    assert all("_matrix." in key for key in saved)  # not the base's weights
    again = run(tmp_path / "again", tmp_path / "step=4.ckpt")
    assert again.losses == whole.losses[4:]
    for key, layer in matrices(whole).items():
        for part, tensor in matrices(again)[key].tensors().items():
            assert torch.equal(tensor, layer.tensors()[part]), (key, part)


@pytest.mark.parametrize("name", OWN)
def test_the_results_of_a_run_and_of_its_checkpoint(name: str, tmp_path: Path) -> None:
    module = Training(name)
    saver = ModelCheckpoint(tmp_path / "saved", "{step}", every_n_train_steps=8, save_top_k=-1)
    fit(tmp_path, module, config_of(name), saver)
    wanted = module.model(X)
    state = {f"model.{key}": value for key, value in made(name, torch.float32).state_dict().items()}
    save_file(state, tmp_path / "base.safetensors")
    extract_files(
        tmp_path / "saved" / "step=8.ckpt", tmp_path / "base.safetensors", tmp_path / "extracted", progress=False
    )
    for folder in ("extracted", "out/adapter"):
        again = Training(name)
        load_adapter(again, tmp_path / folder)
        torch.testing.assert_close(again.model(X), wanted, rtol=1e-4, atol=1e-5)


def test_averages_and_disabling(tmp_path: Path) -> None:
    module = Training()
    fit(tmp_path, module, config_of("encoder"), EMAWeightAveraging(decay=0.5))
    trained = module.model(X)
    with disable_adapter(module):
        torch.testing.assert_close(module.model(X), made("encoder", torch.float32)(X))
    again = Training()
    load_adapter(again, tmp_path / "out" / "adapter")
    torch.testing.assert_close(again.model(X), trained, rtol=1e-4, atol=1e-5)


def test_mixed_precision_and_gradient_accumulation(tmp_path: Path) -> None:
    module = Training()
    fit(tmp_path, module, config_of("encoder"), precision="bf16-mixed", accumulate_grad_batches=2, max_steps=4)
    assert module.losses[0] != module.losses[-1]
    assert all(tensor.any() for layer in matrices(module).values() for tensor in layer.core.trained().values())


class Held(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.eye(D))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w


class Reading(nn.Module):
    """Reads the parameter of its child, whose forward pass never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.held, self.line = Held(), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.line(x) @ self.held.w
        return y


def test_a_parent_that_reads_the_parameter_is_reported(tmp_path: Path) -> None:
    module = Training("attention")
    module.model = Reading()
    config = PMSSConfig(rank=3, target_modules=["line"], target_parameters=["held.w"])
    with pytest.warns(
        UserWarning, match=r"`model\.held\.w` got no gradient: the forward pass of the module that owns.*also_train"
    ):
        fit(tmp_path, module, config, max_steps=3)


def test_what_is_not_there_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=r"FlatLoRA gives no noise to parameters of other modules, such as `model\.encoder"
    ):
        fit(tmp_path, Training(), config_of("encoder"), FlatLoRA())
    for engine in ("fsdp1", "fsdp2", "zero"):
        monkeypatch.setattr("lightning_pmss.callbacks.adapter.prepare_strategy", lambda *_, engine=engine: engine)
        with pytest.raises(
            Exception, match=rf"on its own parameters \(target_parameters\), which {engine} cannot shard.*'ddp'"
        ):
            fit(tmp_path / engine, Training(), config_of("encoder"))


@pytest.mark.parametrize(
    ("name", "kind"),
    [("attention", LoRAConfig), ("encoder", PMSSConfig), ("twice", HiRAConfig), ("cross", PMSSConfig)],
)
def test_a_compiled_model_gives_the_same(name: str, kind: Any) -> None:
    model = made(name)
    convert(model, config_of(name, kind))
    train(model)
    trained = [t for layer in matrices(model).values() for t in layer.core.trained().values()]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for training in (True, False):
        model.train(training)
        x = inputs().requires_grad_()
        wanted, found = model(x), compiled(x)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)
        own = torch.autograd.grad(found.square().sum(), [x, *trained])
        for one, two in zip(own, torch.autograd.grad(wanted.square().sum(), [x, *trained]), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-10)
    with torch.no_grad():
        for tensor in trained:
            tensor.mul_(2)
        torch.testing.assert_close(compiled(inputs()), model(inputs()), rtol=1e-9, atol=1e-11)
    assert dict(model.named_parameters()).keys() == {n for n, _ in compiled._orig_mod.named_parameters()}


@pytest.mark.distributed
def test_two_processes(tmp_path: Path) -> None:
    two_runs("tests.matrices.training", tmp_path)


@pytest.mark.distributed
def test_processes_that_lightning_starts_itself(tmp_path: Path) -> None:
    """`ddp_fork` trains copies of the module; the one of the calling process gets the adapters of experts and routers."""
    done = forks.run(["-m", "tests.matrices.launched", tmp_path])
    assert done.returncode == 0, done.stderr[-3000:]
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert {".".join(name.split(".")[4:]) for name in numbers if "layers.1.mlp" in name} == {
        "experts.down_proj.0", "experts.down_proj.1", "experts.down_proj.2", "experts.down_proj.3", "gate.weight",
    }  # fmt: skip
    stored = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    trained = [name for name, (value,) in numbers.items() if value]
    assert any(name.endswith("gate.weight") for name in trained)
    assert any("experts" in name for name in trained)
    assert all(f"{name}.U" in stored and bool(stored[f"{name}.U"].any()) for name in trained)
