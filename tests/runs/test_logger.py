"""The log of a run that was stopped and has gone on is that of one that was not."""

from __future__ import annotations

import csv
import pkgutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_pmss import PMSSCallback
from lightning_pmss.checkpoints.reading import step_of
from lightning_pmss.inspect.run import read_run
from lightning_pmss.runs.configuration import continue_log, in_folder
from lightning_pmss.runs.logger import ContinuedCSVLogger
from tests.callbacks.test_ending import Stop
from tests.callbacks.toys import Numbers, Toy, trainer


def fit(folder: Path, *more: Any, checkpoint: Path | None = None) -> None:
    torch.manual_seed(1)
    saver = ModelCheckpoint(folder / "checkpoints", every_n_train_steps=5, save_top_k=0, save_last=True)
    options: dict[str, Any] = {"val_check_interval": 4, "log_every_n_steps": 3}
    config = in_folder({}, folder, [])
    if checkpoint is not None:
        continue_log(config, step_of(checkpoint))
    written = config["trainer"]["logger"]
    options["logger"] = pkgutil.resolve_name(written["class_path"])(**written["init_args"])
    callback = PMSSCallback(rank=6, output_dir=folder / "out", merge_on_save=None)
    trainer(folder, callback, saver, *more, **options).fit(Toy(), Numbers(), ckpt_path=checkpoint)


def logged(folder: Path) -> list[Any]:
    """Everything that is no measurement of time and memory."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [(row["step"], row["epoch"], row["loss"], row["val_loss"]) for row in csv.DictReader(file)]


@pytest.mark.parametrize("at", [8, 11, 13, 14])
def test_a_stopped_run_keeps_its_log(tmp_path: Path, at: int) -> None:
    """Killed at a step, it goes on from one before; what it logs again is there once."""
    fit(tmp_path / "whole")
    folder = tmp_path / "killed"
    with pytest.raises(SystemExit):
        fit(folder, Stop("on_train_batch_start", at, SystemExit(9)))
    assert (int(logged(folder)[-1][0]) >= 10) == (at > 11)  # some have logged more than the checkpoint knows
    fit(folder, checkpoint=folder / "checkpoints" / "last.ckpt")
    assert logged(folder) == logged(tmp_path / "whole")
    assert read_run(folder).curves["val_loss"] == read_run(tmp_path / "whole").curves["val_loss"]


def test_a_line_that_a_kill_has_cut_off_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("loss,step,val\r\n0.5,3,\r\n,4,0.25\r\n1.0,5,\r\n0.125,1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logger = ContinuedCSVLogger(save_dir=str(tmp_path), name="", version="", before=5)
        logger.log_hyperparams({"a": 1})
    assert (tmp_path / "metrics.csv").read_text().split() == [
        "loss,step,val",
        "0.5,3,",
        ",4,0.25",
    ]  # nothing is logged yet
    logger.log_metrics({"loss": 0.75, "new": 1}, step=5)
    logger.log_metrics({"loss": 0.5}, step=0)  # the file has it
    logger.save()
    assert (tmp_path / "metrics.csv").read_text().split() == ["loss,new,step,val", "0.5,,3,", ",,4,0.25", "0.75,1,5,"]
