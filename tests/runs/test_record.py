"""A run writes its scores, always has one after the last step, and refuses a metric that it does not log."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_pmss import PMSSCallback
from lightning_pmss.checkpoints.reading import step_of
from lightning_pmss.runs.checkpoints import newest
from lightning_pmss.runs.record import RunRecord, ScoresRecord, await_free, read_progress, read_record
from tests.callbacks.test_ending import Stop
from tests.callbacks.toys import Numbers, Toy, trainer

SETTINGS: dict[str, Any] = {"check_val_every_n_epoch": None, "num_sanity_val_steps": 1}  # 6 batches an epoch


def fit(folder: Path, record: RunRecord, checkpoint: str | None = None, **options: Any) -> Toy:
    torch.manual_seed(1)
    callback = PMSSCallback(rank=6, output_dir=folder / "out", merge_on_save=None)
    saver = ModelCheckpoint(folder / "checkpoints", "{step}", every_n_train_steps=5, save_top_k=-1, save_last=True)
    module = Toy()
    more = options.pop("more", ())
    trainer(folder, callback, saver, record, *more, **SETTINGS | options).fit(module, Numbers(), ckpt_path=checkpoint)
    return module


def losses(scores: ScoresRecord) -> list[Any]:
    """Everything that is no measurement of time and memory."""
    return [scores.step, scores.metrics["loss"], scores.metrics["val_loss"]]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"max_epochs": -1, "max_steps": 14, "val_check_interval": 10**9}, [14]),
        ({"max_epochs": -1, "max_steps": 14, "val_check_interval": 4}, [4, 8, 12, 14]),
        ({"max_epochs": 2, "val_check_interval": 4}, [4, 8, 12]),
        # Two batches a step, the last one of an epoch has what is left.
        ({"max_epochs": 3, "accumulate_grad_batches": 4, "val_check_interval": 10**9}, [6]),
    ],
)
def test_scores(tmp_path: Path, options: dict[str, Any], steps: list[int]) -> None:
    fit(tmp_path, RunRecord(tmp_path / "run", "val_loss"), **options)
    found = read_record(tmp_path / "run")
    assert found is not None
    assert [each.step for each in found.scores] == steps
    assert (found.steps, found.finished) == (steps[-1], True)
    progress = read_progress(tmp_path / "run")
    assert progress is not None
    assert progress[1] == steps[-1]
    module = fit(tmp_path / "again", RunRecord(tmp_path / "again" / "run"), **options)
    with torch.no_grad():
        sums = [module.loss(batch).item() * len(batch[0]) for batch in Numbers().val_dataloader()]
    assert found.scores[-1].metrics["val_loss"] == pytest.approx(sum(sums) / 22, rel=1e-5)


def test_a_metric_that_is_not_logged(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'val_los' is not logged in validation; logged is `val_loss`. Did you mean"):
        fit(tmp_path, RunRecord(tmp_path / "run", "val_los"), max_steps=4, max_epochs=-1, val_check_interval=10**9)
    assert read_record(tmp_path / "run") is None  # refused before the first step


def check_resumed(folder: Path) -> None:
    """The run in ``resumed`` has finished, with the scores of the one in ``whole``."""
    whole, resumed = (read_record(folder / name) for name in ("whole", "resumed"))
    assert whole is not None
    assert resumed is not None
    assert resumed.finished
    assert [losses(each) for each in resumed.scores] == [losses(each) for each in whole.scores]


def test_a_resumed_run_has_the_scores_of_one_that_was_not_stopped(tmp_path: Path) -> None:
    options = {"max_epochs": -1, "max_steps": 13, "val_check_interval": 4}
    fit(tmp_path / "whole", RunRecord(tmp_path / "whole"), **options)
    checkpoint = tmp_path / "whole" / "checkpoints" / "step=10.ckpt"
    fit(tmp_path / "resumed", RunRecord(tmp_path / "resumed"), str(checkpoint), **options)
    check_resumed(tmp_path)


@pytest.mark.parametrize("what", [signal.SIGTERM, ValueError("of the user")])
def test_equal_epochs_interrupted_in_the_last_validation(tmp_path: Path, what: Any) -> None:
    """A checkpoint with all steps resumes to nothing; the run goes on from the one before, by the steps it noted."""
    options: dict[str, Any] = {"max_epochs": 2, "val_check_interval": 10**9}  # 12 steps
    fit(tmp_path / "whole", RunRecord(tmp_path / "whole"), **options)
    folder = tmp_path / "stopped"
    with pytest.raises((SystemExit, ValueError)):
        fit(
            folder, RunRecord(folder), more=[Stop("on_validation_start", 2, what)], **options
        )  # behind the sanity check
    record = read_record(folder)
    assert record is not None
    assert (record.steps, record.finished) == (12, False)
    assert step_of(folder / "checkpoints" / "last-interrupted.ckpt") == 12
    checkpoint = newest([folder], record.steps)
    assert checkpoint == folder / "checkpoints" / "last.ckpt"
    fit(tmp_path / "resumed", RunRecord(tmp_path / "resumed"), str(checkpoint), **options)
    check_resumed(tmp_path)


def test_a_run_that_could_not_write_its_adapter_has_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on from the checkpoint before its last step, and writes the adapter then."""

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    options: dict[str, Any] = {"max_epochs": -1, "max_steps": 12, "val_check_interval": 10**9}
    with monkeypatch.context() as patch:
        patch.setattr("lightning_pmss.callbacks.ending.write_adapter", full)
        with pytest.raises(OSError, match="no space left"):
            fit(tmp_path, RunRecord(tmp_path / "run"), **options)
    record = read_record(tmp_path / "run")
    assert record is not None
    assert record.scores[-1].step == record.steps == 12
    assert not record.finished
    checkpoint = newest([tmp_path], record.steps)
    assert checkpoint == tmp_path / "checkpoints" / "last.ckpt"
    fit(tmp_path, RunRecord(tmp_path / "again"), str(checkpoint), **options)
    again = read_record(tmp_path / "again")
    assert again is not None
    assert again.finished
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_metric_that_is_not_finite_is_null(tmp_path: Path) -> None:
    class Broken(Toy):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", float("nan"))

    record = RunRecord(tmp_path / "run")
    trainer(tmp_path, None, record, **SETTINGS, max_steps=3, max_epochs=-1, val_check_interval=10**9).fit(
        Broken(), Numbers()
    )
    found = read_record(tmp_path / "run")
    assert found is not None
    assert found.scores[-1].metrics["val_loss"] is None


def test_one_process_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_pmss.runs.record._WAIT", 0.1)
    first = RunRecord(tmp_path / "run")
    options = {"max_epochs": -1, "max_steps": 2, "val_check_interval": 10**9}
    fit(tmp_path / "first", first, **options)
    with pytest.raises(ValueError, match="another process has been training in"):
        await_free(tmp_path / "run")
    await_free(tmp_path)
    with pytest.raises(ValueError, match="another process has been training in"):
        fit(tmp_path / "second", RunRecord(tmp_path / "run"), **options)


def test_a_damaged_record(tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text('{"steps": 3, "scores": [{"step": 1}]}')
    with pytest.raises(
        ValueError, match=r"`scores.0.metrics` is missing. Remove the run's folder; it then starts anew"
    ):
        read_record(tmp_path)
    (tmp_path / "record.json").unlink()
    assert read_record(tmp_path) is None
    assert read_progress(tmp_path) is None
