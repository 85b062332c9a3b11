"""Runs with averages that are stopped, fail, or had ended before they are resumed write the average."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from safetensors.torch import save_file
from torch import Tensor

from lightning_pmss import PMSSCallback
from lightning_pmss.checkpoints.extract import extract_files
from tests.callbacks import toys
from tests.callbacks.test_ending import Stop
from tests.killing import files

WEIGHTS = "adapter_model.safetensors"


def ema() -> L.Callback:
    return EMAWeightAveraging(decay=0.8)


def swa() -> L.Callback:
    return StochasticWeightAveraging(swa_lrs=0.02, swa_epoch_start=1, annealing_epochs=1)


def every_step(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder / "saved", "{step}", every_n_train_steps=1, save_top_k=-1)


def fit(folder: Path, *around: Any, checkpoint: Path | None = None, kind: Any = toys.Toy, **options: Any) -> toys.Toy:
    """A fit with dropout and validation; None stands for `PMSSCallback`. Resumed, its random states are others."""
    torch.manual_seed(1 if checkpoint is None else 5)
    module = kind()
    settings = {"rank": 6, "dropout": 0.3, "output_dir": folder / "out"} | options.pop("callback", {})
    callbacks = [PMSSCallback(**settings) if callback is None else callback for callback in around]
    runner = toys.trainer(folder, None, *callbacks, **options)
    runner.fit(module, toys.Numbers(), ckpt_path=None if checkpoint is None else str(checkpoint))
    return module


def stopped(folder: Path, *around: Any, **options: Any) -> Path:
    """The checkpoint that a stopped run leaves."""
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises((SystemExit, ValueError)):
        fit(folder, *around, **options)
    signal.signal(signal.SIGINT, before)  # Lightning ignores it after Ctrl-C, as the process is about to end
    return folder / "out" / "last-interrupted.ckpt"


class Keep(L.Callback):
    """What a stopped run leaves in its module."""

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        kept = {f"net.{i}.{part}" for i in (0, 2) for part in ("rows", "cols", "core.weight")}
        self.live = {k: v.clone() for k, v in pl_module.state_dict().items() if k in kept}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, toys.Toy]:
    """The folder of a fit with an average that nothing disturbed, and its module; a checkpoint of each step."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, fit(folder, None, ema(), every_step(folder))


MOMENTS = [
    *[(f"on_validation_{hook}", 2) for hook in ("start", "epoch_start", "epoch_end", "end")],
    *[(f"on_validation_batch_{hook}", 11) for hook in ("start", "end")],
    ("on_train_batch_start", 9),
]


@pytest.mark.parametrize("what", [signal.SIGINT, ValueError("of the user")])
@pytest.mark.parametrize(("hook", "call"), MOMENTS)
@pytest.mark.parametrize("order", ["pmss ema stop", "stop ema pmss"])
def test_stopped_in_a_validation_it_goes_on_exactly(
    tmp_path: Path, whole: tuple[Path, toys.Toy], hook: str, call: int, what: Any, order: str
) -> None:
    parts = {"pmss": None, "ema": ema(), "stop": Stop(hook, call, what)}
    checkpoint = stopped(tmp_path, *(parts[name] for name in order.split()))
    left = torch.load(checkpoint)
    undisturbed = torch.load(whole[0] / "saved" / f"step={left['global_step']}.ckpt")
    for name in ("state_dict", "current_model_state", "averaging_state"):
        assert same(left[name], undisturbed[name]), name
    assert not same(left["state_dict"], left["current_model_state"])
    again = fit(tmp_path, None, ema(), checkpoint=checkpoint)
    assert again.losses == whole[1].losses[left["global_step"] :]
    assert files(tmp_path / "out") == files(whole[0] / "out")


@pytest.mark.parametrize("every", [1, 2])
def test_a_step_that_fails_before_its_average_is_averaged_all_the_same(tmp_path: Path, every: int) -> None:
    def average() -> L.Callback:
        return EMAWeightAveraging(decay=0.8, update_every_n_steps=every)

    whole = fit(tmp_path / "whole", None, average())
    failing = Stop("on_train_batch_end", 9, ValueError("of the user"))
    checkpoint = stopped(tmp_path, None, failing, average())
    again = fit(tmp_path, None, average(), checkpoint=checkpoint)
    assert again.losses == whole.losses[9:]
    assert files(tmp_path / "out") == files(tmp_path / "whole" / "out")


def test_stopped_while_it_puts_the_average_in_place_nothing_is_saved(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Cut(EMAWeightAveraging):
        def _swap_models(self, pl_module: Any) -> None:
            if pl_module.trainer.global_step == 12:
                pl_module.net[0].core.weight.data.zero_()
                raise KeyboardInterrupt
            super()._swap_models(pl_module)

    with caplog.at_level("INFO"):
        stopped(tmp_path, None, Cut(decay=0.8))
    assert "while a validation exchanged average and weights, when the two are mixed: not saved" in caplog.text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("hook", "call"), [("on_train_batch_start", 9), ("on_train_batch_end", 9), ("on_validation_batch_end", 11)]
)
@pytest.mark.parametrize("average", [ema, swa, None])
def test_the_adapter_of_a_stopped_run_is_the_one_of_its_checkpoint(
    tmp_path: Path, hook: str, call: int, average: Any
) -> None:
    base, around = tmp_path / "base.safetensors", [] if average is None else [average()]
    save_file(toys.Toy().state_dict(), base)
    stop = Stop(hook, call, signal.SIGINT)
    keep = Keep()
    checkpoint = stopped(tmp_path, None, *around, keep, stop)
    mine, left = tmp_path / "out" / "adapter" / WEIGHTS, torch.load(checkpoint)
    extract_files(checkpoint, base, tmp_path / "extracted", progress=False)
    assert mine.read_bytes() == (tmp_path / "extracted" / WEIGHTS).read_bytes()
    live = left.get("current_model_state", left["state_dict"])
    assert live["net.0.core.weight"].any()
    assert same(live, keep.live)  # the module is as it was
    if average is not swa:  # whose average is set after the last epoch alone
        whole = [] if average is None else [average()]
        fit(tmp_path / "whole", None, *whole, max_steps=left["global_step"])
        assert mine.read_bytes() == (tmp_path / "whole" / "out" / "adapter" / WEIGHTS).read_bytes()


# -- nothing left to train ----------------------------------------------------------------------------------------------


class Normed(toys.Toy):
    """With BatchNorm, for which `StochasticWeightAveraging` adds an epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.net.append(torch.nn.BatchNorm1d(16))


@pytest.mark.parametrize(
    ("average", "kind", "options", "by_step"),
    [
        (ema, toys.Toy, {}, False),
        (ema, toys.Toy, {"max_steps": 18}, True),
        (ema, Normed, {"max_steps": 15}, True),
        (swa, toys.Toy, {}, False),
        (swa, toys.Toy, {"max_steps": 18}, False),
        (swa, toys.Toy, {"max_steps": 15}, True),
        (swa, toys.Toy, {"max_steps": 9}, True),  # before the last epoch, where Lightning does not set the average
        (swa, toys.Toy, {"max_steps": 18, "max_epochs": -1}, True),
        (swa, Normed, {}, False),
        (swa, Normed, {"max_steps": 15}, True),
    ],
)
def test_a_finished_run_that_is_resumed_writes_what_it_would_have(
    tmp_path: Path, average: Any, kind: type[toys.Toy], options: dict[str, Any], by_step: bool
) -> None:
    saver: dict[str, Any] = {"every_n_train_steps": 3} if by_step else {"save_on_train_epoch_end": True}

    def run(name: str, checkpoint: Path | None = None) -> toys.Toy:
        last = ModelCheckpoint(tmp_path / name / "saved", "last", **saver)
        return fit(tmp_path / name, None, average(), last, checkpoint=checkpoint, kind=kind, **options)

    first = run("whole")
    again = run("again", tmp_path / "whole" / "saved" / "last.ckpt")
    assert not again.losses
    assert first.net[0].core.weight.any()
    assert same(first.state_dict(), again.state_dict())
    mine, theirs = files(tmp_path / "again" / "out"), files(tmp_path / "whole" / "out")
    del mine["adapter/README.md"], theirs["adapter/README.md"]  # with metrics of after the checkpoint
    assert mine == theirs


@pytest.mark.parametrize("options", [{}, {"max_steps": 18}])
def test_a_merged_model_that_is_made_up_for_is_of_the_average(tmp_path: Path, options: dict[str, Any]) -> None:
    options = options | {"callback": {"merge_on_save": "checkpoint"}}
    fit(tmp_path, None, ema(), every_step(tmp_path), **options)
    results = files(tmp_path / "out" / "merged")
    for name in ("step=12", "step=18"):
        folder = tmp_path / "saved" / f"{name}-merged"
        before = files(folder)
        shutil.rmtree(folder)
        left = tmp_path / "saved" / f"{name}.ckpt"
        fit(tmp_path, None, ema(), every_step(tmp_path), checkpoint=left, **options)
        assert files(folder) == before
        assert files(tmp_path / "out" / "merged") == results
