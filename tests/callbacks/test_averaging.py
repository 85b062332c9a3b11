"""Averages of models beside the callback: of what is trained, in either order, written, stored and resumed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from lightning_pmss import PMSSCallback, load_adapter
from lightning_pmss.callbacks.averaging import refuse_averages
from lightning_pmss.conversion.convert import adapted_layers
from tests.callbacks.toys import LateToy, Numbers, Toy, inputs, make_net, plain_loader, trainer

DECAY = 0.8


class Recorder(L.Callback):
    """V after every step and at the start of every epoch, and what validation was run with."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []
        self.epochs: list[dict[str, Tensor]] = []
        self.validated: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        self.steps.append(values(pl_module))

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.epochs.append(values(pl_module))

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        self.validated.append(values(pl_module))


def values(module: Any) -> dict[str, Tensor]:
    return {n: layer.core.weight.detach().clone() for n, layer in adapted_layers(module).items()}


def averaging(kind: str) -> L.Callback:
    if kind == "swa":
        return StochasticWeightAveraging(swa_lrs=0.02, swa_epoch_start=1, annealing_epochs=1)
    return EMAWeightAveraging(decay=DECAY)


def expected(kind: str, recorder: Recorder) -> dict[str, Tensor]:
    """The mean of V in float64 by its definition."""
    seen = recorder.epochs if kind == "swa" else recorder.steps
    mean = {n: v.double() for n, v in seen[0].items()}
    for count, now in enumerate(seen[1:], 1):
        share = 1 / (count + 1) if kind == "swa" else 1 - DECAY
        mean = {n: (1 - share) * mean[n] + share * now[n].double() for n in mean}
    return mean


def run(
    folder: Path, kind: str, first: bool, module: Toy | None = None, *more: L.Callback, **options: Any
) -> tuple[Toy, Recorder]:
    torch.manual_seed(1)
    module, recorder = module or Toy(), Recorder()
    pmss = PMSSCallback(rank=6, output_dir=folder / "out", **options.pop("pmss", {}))
    checkpoint = options.pop("ckpt_path", None)
    around = [averaging(kind)] if kind else []
    runner = trainer(
        folder, None, *(around if first else []), pmss, *([] if first else around), recorder, *more, **options
    )
    runner.fit(module, Numbers(), ckpt_path=checkpoint)
    return module, recorder


@pytest.mark.parametrize("kind", ["ema", "swa"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("late", [True, False])
def test_results_are_of_the_average(tmp_path: Path, kind: str, first: bool, late: bool) -> None:
    module, recorder = run(tmp_path, kind, first, LateToy() if late else Toy())
    mean, base, x = expected(kind, recorder), make_net(), inputs().tensors[0]
    for name, layer in adapted_layers(module).items():
        torch.testing.assert_close(layer.core.weight.double(), mean[name], rtol=1e-5, atol=1e-6)
        assert (layer.core.weight - recorder.steps[-1][name]).norm() > 0.05 * layer.core.weight.norm()
        assert torch.equal(layer.weight, base.get_submodule(name.removeprefix("net.")).weight)
    fresh, plain = Toy(), make_net()
    load_adapter(fresh, tmp_path / "out" / "adapter")
    state = load_file(tmp_path / "out" / "merged" / "model.safetensors")
    plain.load_state_dict({k.removeprefix("net."): v for k, v in state.items()})
    with torch.no_grad():
        for name, layer in adapted_layers(fresh).items():
            layer.core.weight.copy_(mean[name])
        reference = fresh.net(x)
        load_adapter(fresh, tmp_path / "out" / "adapter")
        torch.testing.assert_close(fresh.net(x), reference, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(plain(x), reference, rtol=1e-4, atol=1e-5)


def test_validation_is_of_the_average_and_leaves_no_trace(tmp_path: Path) -> None:
    _, recorder = run(tmp_path, "ema", True)
    _, alone = run(tmp_path / "alone", "", False)
    for ours, theirs in zip(recorder.steps, alone.steps, strict=True):
        assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    upto = Recorder()
    upto.steps = recorder.steps[: len(recorder.steps) // 3]
    seen = next(v for v in recorder.validated if any(t.any() for t in v.values()))
    for name, mean in expected("ema", upto).items():
        torch.testing.assert_close(seen[name].double(), mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["ema", "swa"])
@pytest.mark.parametrize("first", [True, False])
def test_checkpoints_are_small_and_resume_exactly(tmp_path: Path, kind: str, first: bool) -> None:
    saver = ModelCheckpoint(tmp_path / "saved", "{epoch}", save_top_k=-1)
    whole, _ = run(tmp_path / "whole", kind, first, None, saver)
    stored = torch.load(tmp_path / "saved" / "epoch=1.ckpt")
    kept = {f"net.{i}.{part}" for i in (0, 2) for part in ("rows", "cols", "core.weight")}
    assert set(stored["state_dict"]) == kept
    if kind == "ema":
        assert set(stored["current_model_state"]) == kept
        assert set(stored["averaging_state"]) == {"n_averaged"}
        assert not torch.equal(
            stored["current_model_state"]["net.0.core.weight"], stored["state_dict"]["net.0.core.weight"]
        )
    else:
        (state,) = (s for s in stored["callbacks"].values() if "average_model_state" in s)
        assert set(state["average_model_state"]) == kept
    resumed, _ = run(tmp_path / "on", kind, first, None, ckpt_path=str(tmp_path / "saved" / "epoch=1.ckpt"))
    assert resumed.losses == whole.losses[-len(resumed.losses) :]
    assert 0 < len(resumed.losses) < len(whole.losses)
    for name, value in values(whole).items():
        assert torch.equal(values(resumed)[name], value)
    base = make_net()
    assert torch.equal(resumed.net[0].weight, base[0].weight)
    # What is evaluated by path is the average.
    scores = trainer(tmp_path, PMSSCallback(rank=6)).validate(
        Toy(), plain_loader(), ckpt_path=str(tmp_path / "saved" / "epoch=2.ckpt"), verbose=False
    )
    if kind == "ema":
        assert scores == trainer(tmp_path, PMSSCallback(rank=6)).validate(whole, plain_loader(), verbose=False)


def test_a_run_without_averages_can_go_on_with_them_and_the_other_way_round(tmp_path: Path) -> None:
    for before, after in (("", "ema"), ("ema", "")):
        saver = ModelCheckpoint(tmp_path / f"from{before}", "{epoch}", save_top_k=-1)
        run(tmp_path / "one", before, False, None, saver, max_epochs=1)
        module, _ = run(
            tmp_path / "two", after, False, None, ckpt_path=str(tmp_path / f"from{before}" / "epoch=0.ckpt")
        )
        assert torch.equal(module.net[0].weight, make_net()[0].weight)
        assert len(module.losses) > 0


def test_the_merged_model_beside_a_checkpoint_is_of_its_weights(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path / "saved", "{epoch}", save_top_k=-1)
    module, _ = run(tmp_path, "ema", False, None, saver, max_epochs=2, pmss={"merge_on_save": "checkpoint"})
    last = load_file(tmp_path / "saved" / "epoch=1-merged" / "model.safetensors")
    final = load_file(tmp_path / "out" / "merged" / "model.safetensors")
    assert all(torch.equal(last[k], final[k]) for k in final)
    assert not torch.equal(
        load_file(tmp_path / "saved" / "epoch=0-merged" / "model.safetensors")["net.0.weight"], last["net.0.weight"]
    )


@pytest.mark.parametrize("averager", [WeightAveraging(avg_fn=get_ema_avg_fn(0.9), use_buffers=False), averaging("swa")])
def test_no_copy_of_the_frozen_weights_is_kept(tmp_path: Path, averager: Any) -> None:
    module = Toy()
    trainer(tmp_path, None, averager, PMSSCallback(rank=6, output_dir=tmp_path), max_epochs=2).fit(
        module, plain_loader()
    )
    shared = {p.data_ptr() for p in module.parameters()}
    held = averager._average_model
    frozen = [p for n, p in held.named_parameters() if not n.endswith("core.weight")]
    assert not frozen
    assert all(p.data_ptr() not in shared for p in held.named_parameters() and dict(held.named_parameters()).values())


def test_averages_of_sharded_models_are_refused(tmp_path: Path) -> None:
    for averager in (averaging("ema"), averaging("swa")):
        runner = trainer(tmp_path, None, averager)
        with pytest.raises(MisconfigurationException, match=rf"`{type(averager).__name__}` copies whole models.*'ddp'"):
            refuse_averages(runner, "fsdp2")


class OwnAverage(L.Callback):
    """What people write: all parameters, copied back at the end; either order of hooks."""

    def __init__(self, decay: float = 0.9) -> None:
        self.decay = decay

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.mean = {n: p.detach().clone() for n, p in pl_module.named_parameters()}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        with torch.no_grad():
            for name, parameter in pl_module.named_parameters():
                self.mean[name] = self.decay * self.mean[name] + (1 - self.decay) * parameter

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        for name, parameter in pl_module.named_parameters():
            parameter.data.copy_(self.mean[name])


def test_an_average_of_ones_own_is_written_and_its_rounding_reported(tmp_path: Path) -> None:
    own, module = OwnAverage(), Toy()
    runner = trainer(tmp_path, None, PMSSCallback(rank=6, output_dir=tmp_path / "out"), own)
    with pytest.warns(UserWarning, match=r"frozen weights of `net\.0`, `net\.2` were changed .*EMAWeightAveraging"):
        runner.fit(module, plain_loader())
    fresh = Toy()
    load_adapter(fresh, tmp_path / "out" / "adapter")  # it belongs to the base as it was
    for name, layer in adapted_layers(fresh).items():
        torch.testing.assert_close(layer.core.weight, own.mean[f"{name}.core.weight"], rtol=1e-4, atol=1e-6)


def test_frozen_weights_that_moved_are_an_error_and_the_adapter_is_safe(tmp_path: Path) -> None:
    class Moves(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
            pl_module.net[2].weight.data.mul_(1.01)

    with pytest.raises(
        RuntimeError, match=r"frozen weights of `net\.2` were changed.*No merged model.*adapter in .*out"
    ):
        trainer(tmp_path, None, PMSSCallback(rank=6, output_dir=tmp_path / "out"), Moves()).fit(Toy(), plain_loader())
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"adapter"}
    load_adapter(Toy(), tmp_path / "out" / "adapter")


class Teacher(Toy):
    """An average as a child of the module, made early or late."""

    def __init__(self, early: bool, kind: Any) -> None:
        super().__init__()
        self.kind = kind
        if early:
            self.ema = kind(self.net)

    def on_fit_start(self) -> None:
        if not hasattr(self, "ema"):
            self.ema = self.kind(self.net)


@pytest.mark.parametrize(("early", "kind"), [(True, AveragedModel), (False, AveragedModel), (False, copy.deepcopy)])
def test_copies_inside_the_module_are_refused_before_training(tmp_path: Path, early: bool, kind: Any) -> None:
    module = Teacher(early, kind)
    with pytest.raises(
        MisconfigurationException, match=r"`ema.*0`, `ema.*2` are converted layers in a copy.*EMAWeight"
    ):
        trainer(tmp_path, PMSSCallback(rank=6, output_dir=tmp_path)).fit(module, plain_loader())
    assert not module.losses


def test_a_copy_outside_the_module_is_nobodys_business(tmp_path: Path) -> None:
    class Keeps(L.Callback):
        def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            self.copy = copy.deepcopy(pl_module)

    keeps, module = Keeps(), Toy()
    trainer(tmp_path, PMSSCallback(rank=6, output_dir=tmp_path), keeps).fit(module, plain_loader())
    assert not keeps.copy.net[0].core.weight.any()
    assert module.net[0].core.weight.any()
    assert torch.equal(keeps.copy.net[0].rows, module.net[0].rows)
