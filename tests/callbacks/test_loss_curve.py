"""LossCurve: points by hand, a picture at the end of fit, the whole curve after a resume."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_pmss.callbacks.loss_curve import LossCurve


class Counting(BoringModel):
    """Loss of the n-th batch is n."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.calls += 1
        return {"loss": self.layer(batch).sum() * 0 + self.calls}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", torch.tensor(10.0 + self.calls))


def trainer(folder: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    limits = {"limit_train_batches": 4, "limit_val_batches": 1, "max_epochs": 2, "num_sanity_val_steps": 1}
    base = {"accelerator": "cpu", "devices": 1, "default_root_dir": folder, "enable_checkpointing": False}
    return L.Trainer(callbacks=list(callbacks), **{**base, **quiet, **limits, **options})


def test_points_and_picture(tmp_path: Path) -> None:
    curve = LossCurve()
    trainer(tmp_path, curve).fit(Counting())
    train, val = curve.points()
    assert train == [(step, float(step)) for step in range(1, 9)]
    assert val == [(4, 14.0), (8, 18.0)]  # without the sanity check
    assert curve.path == tmp_path / "loss.png"
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_accumulated_batches_are_one_point(tmp_path: Path) -> None:
    curve = LossCurve(dirpath=str(tmp_path / "pictures"))
    trainer(tmp_path, curve, accumulate_grad_batches=2, max_epochs=1).fit(Counting())
    assert curve.points()[0] == [(1, 1.5), (2, 3.5)]
    assert (tmp_path / "pictures" / "loss.png").is_file()


def test_another_trainer_begins_a_new_curve_and_the_same_one_goes_on(tmp_path: Path) -> None:
    curve = LossCurve()
    again = trainer(tmp_path, curve, max_epochs=1)
    trainer(tmp_path, curve).fit(Counting())
    again.fit(Counting())
    assert curve.points() == ([(step, float(step)) for step in range(1, 5)], [(4, 14.0)])
    again.fit_loop.max_epochs = 2
    again.fit(again.lightning_module)
    assert [step for step, _ in curve.points()[0]] == list(range(1, 9))
    assert [step for step, _ in curve.points()[1]] == [4, 8]


def test_resumed_run_draws_the_whole_curve(tmp_path: Path) -> None:
    first = trainer(tmp_path, LossCurve(), max_epochs=1)
    module = Counting()
    first.fit(module)
    first.save_checkpoint(tmp_path / "one.ckpt")
    curve = LossCurve()
    trainer(tmp_path, curve).fit(module, ckpt_path=tmp_path / "one.ckpt")
    assert [step for step, _ in curve.points()[0]] == list(range(1, 9))
    assert [step for step, _ in curve.points()[1]] == [4, 8]


def test_finished_run_that_is_resumed_draws_it_too(tmp_path: Path) -> None:
    first = trainer(tmp_path / "first", LossCurve())
    first.fit(Counting())
    first.save_checkpoint(tmp_path / "last.ckpt")
    trainer(tmp_path / "again", LossCurve()).fit(Counting(), ckpt_path=tmp_path / "last.ckpt")
    assert (tmp_path / "again" / "loss.png").read_bytes() == (tmp_path / "first" / "loss.png").read_bytes()


def test_trial_run_writes_nothing(tmp_path: Path) -> None:
    trainer(tmp_path, LossCurve(), fast_dev_run=True).fit(Counting())
    assert not list(tmp_path.rglob("*.png"))


def test_missing_matplotlib_is_said_before_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else real(name, *a))
    module = Counting()
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-pmss\[plots\]'"):
        trainer(tmp_path, LossCurve()).fit(module)
    assert module.calls == 0


def test_smoothing_must_be_a_step() -> None:
    with pytest.raises(ValueError, match="smoothing=0"):
        LossCurve(smoothing=0)
