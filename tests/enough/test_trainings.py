"""`enough` with trainings of a tiny model: a killed study gives the scores of an undisturbed one."""

from __future__ import annotations

import csv
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_pmss.cli import main
from lightning_pmss.enough.plan import RECORD
from lightning_pmss.runs.process import Ended
from lightning_pmss.runs.record import read_record
from tests.forks import ROOT, Program
from tests.processes import wait_for

STEPS = 150


def recipe(folder: Path, model: str, steps: int = STEPS) -> Path:
    content: dict[str, Any] = {
        "pmss": {"rank": 8, "dropout": 0.2},
        "model": {
            "class_path": "CausalLMModule",
            "init_args": {
                "model_name_or_path": model,
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.03}},
                "lr_schedule": "cosine",
            },
        },
        "data": {
            "class_path": "ArithmeticDataModule",
            "init_args": {"train_size": 40, "val_size": 9, "test_size": 2, "batch_size": 4, "cache_dir": str(folder / "cache")},
        },
        "trainer": {"accelerator": "cpu", "max_steps": steps},
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def words(path: Path, output: str) -> list[str]:
    options = ["--output", str(path.parent / output), "--sizes=12", "--seeds=1", "--score=best", "--validations=3"]
    return ["enough", "--config", str(path), *options]


def scores(folder: Path) -> Any:
    found = read_record(folder)
    assert found is not None
    return [(each.step, each.metrics["val/loss"]) for each in found.scores]


@pytest.mark.slow
def test_a_killed_study_gives_the_scores_of_one_that_was_not(tiny_llama: str, tmp_path: Path) -> None:
    path = recipe(tmp_path, tiny_llama)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    folder = tmp_path / "study" / "n12-seed0"
    with Program(["-m", "lightning_pmss", *words(path, "study")], env=environment) as program:
        wait_for((folder / "checkpoints" / "last.ckpt").exists, 200)
        program.send_signal(signal.SIGKILL)
        program.wait(60)
    wait_for((folder / "checkpoints" / "last-interrupted.ckpt").exists)
    assert read_record(folder) is None or not finished(folder)
    with Program(["-m", "lightning_pmss", *words(path, "study")], env=environment) as program:
        printed, errors = program.communicate(240)
        assert program.returncode == 0, errors
    assert "[1/1] 12 examples, seed 0: goes on from last-interrupted.ckpt" in printed
    config = (folder / "run.yaml").read_text()
    other = tmp_path / "undisturbed"
    whole = yaml.safe_load(config.replace(str(folder), str(other))) | {"ckpt_path": None}
    whole["trainer"]["logger"]["init_args"]["before"] = 0
    (tmp_path / "whole.yaml").write_text(yaml.safe_dump(whole))
    main(["fit", "--config", str(tmp_path / "whole.yaml")])
    assert [step for step, _ in scores(other)] == [50, 100, 150]
    assert scores(folder) == scores(other)
    assert logged(folder) == logged(other)
    assert not (folder / "checkpoints").exists()
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    (run,) = json.loads((tmp_path / "study" / "enough.json").read_text())["runs"]
    assert run["score"] == min(value for _, value in scores(other))


def logged(folder: Path) -> list[Any]:
    """The log, without measurements of time and memory."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [(row["step"], row["train/loss"], row["val/loss"]) for row in csv.DictReader(file)]


def finished(folder: Path) -> bool:
    found = read_record(folder)
    return found is not None and found.finished


def test_an_unknown_monitor(tiny_llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Found by the sanity check before the training, and said as a refusal, which ends a study."""
    record = {"class_path": RECORD, "init_args": {"folder": str(tmp_path / "run"), "monitor": "val/los"}}
    options = [f"--trainer.callbacks={json.dumps([record])}", "--trainer.check_val_every_n_epoch=null"]
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(recipe(tmp_path, tiny_llama)), *options, "--trainer.val_check_interval=1000"])
    errors = capsys.readouterr().err
    refused = Ended(int(stop.value.code or 0), 1.0, errors).refused
    assert refused is not None
    assert refused.startswith("'val/los' is not logged in validation; logged is `val/loss`")
    assert refused.endswith("Did you mean val/loss?")
