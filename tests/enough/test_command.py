"""`enough` from its command line to its files; `fake_fit` is in the place of the trainings, whose own tests are elsewhere."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_pmss.cli import main
from lightning_pmss.cli.lightning import DataCLI
from lightning_pmss.runs import process
from tests.enough.conftest import FAKE, Enough
from tests.forks import ROOT, Program
from tests.processes import wait_for


def started() -> list[str]:
    return Path("study/started.txt").read_text().split("\n")[:-1]


def result() -> Any:
    return json.loads(Path("study/enough.json").read_text())


def config(run: str) -> Any:
    return yaml.safe_load(Path("study", run, "run.yaml").read_text())


SIZES = "--sizes=4,9,16,64"


def test_a_study(enough: Enough, capsys: pytest.CaptureFixture[str]) -> None:
    assert enough(SIZES, "--seeds=3") == 0
    printed = capsys.readouterr().out
    names = [f"n{size}-seed{seed}" for seed in range(3) for size in (4, 9, 16, 64)]
    assert started() == [f"{name} anew" for name in names]
    assert (
        "4 sizes, 3 seeds: 12 runs of 12 steps in study; subsets keep the shares of the kinds of examples. 10 examples to"
        in printed
    )
    assert re.search(r"\[5/12\] 4 examples, seed 1: val/loss 3\.\d+ after \d+ s; about .* left", printed)
    assert re.search(r"^      64     3 +1\.5", printed, re.MULTILINE)
    assert "Curve: val/loss = " in printed
    assert "Doubling the data from 64 to 128 examples is expected to lower val/loss by 0.1" in printed
    assert "the noise (one run's standard deviation between seeds, " in printed
    found = result()
    assert [run["size"] for run in found["runs"]] == [4, 4, 4, 9, 9, 9, 16, 16, 16, 64, 64, 64]
    assert found["runs"][0]["score"] == pytest.approx(1 + 4 * 4**-0.5 + 0.04)
    assert found["curve"]["exponent"] == pytest.approx(0.5, abs=0.1)
    assert found["sizes"][1]["gain"]["count"] == 3
    page = Path("study/enough.html").read_text()
    assert "<svg" in page
    assert "Doubling the data from 64 to 128" in page
    assert not re.search(r"(src|href)=\"http", page)
    assert Path("study/enough.svg").read_text().startswith("<svg")


def test_steps_that_end_before_the_largest_size(enough: Enough, capsys: pytest.CaptureFixture[str]) -> None:
    assert enough("--sizes=16,64", "--seeds=1", "--trainer.max_steps=4") == 0
    message = (
        "warning: 4 steps are over after 32 examples, so larger sizes are worth no more; give --trainer.max_steps 8, or"
    )
    assert message in capsys.readouterr().err
    assert enough("--sizes=16,64", "--seeds=1", "--trainer.max_steps=8", "--output=other") == 0
    assert enough("--sizes=16,64", "--seeds=1", "--trainer.max_steps=8", "--output=third", "--equal=epochs") == 0
    assert "warning" not in capsys.readouterr().err


def test_configurations_of_runs(enough: Enough) -> None:
    assert enough("--sizes=16,64", "--seeds=2", "--data.seed=5", "--seed_everything=7") == 0
    first, other = config("n16-seed5"), config("n64-seed6")
    chosen = ("train_limit", "seed", "split_seed", "train_limit_by")
    assert [first["data"]["init_args"][name] for name in chosen] == [16, 5, 5, "kind"]
    assert [other["data"]["init_args"][name] for name in chosen] == [64, 6, 5, "kind"]
    assert (first["seed_everything"], other["seed_everything"]) == (7, 8)
    trainer = other["trainer"]
    assert (trainer["max_steps"], trainer["max_epochs"], trainer["check_val_every_n_epoch"]) == (12, -1, None)
    assert trainer["val_check_interval"] > 10**6
    assert (
        trainer["logger"]["init_args"]["save_dir"]
        == trainer["default_root_dir"]
        == str(Path("study/n64-seed6").absolute())
    )
    assert other["pmss"]["merge_on_save"] is None
    kinds = [callback["class_path"].rpartition(".")[2] for callback in trainer["callbacks"]]
    assert kinds == ["RunRecord", "ModelCheckpoint"]
    every = trainer["callbacks"][1]["init_args"]["every_n_train_steps"]
    assert 12 % every  # one at the last step would resume without the validation that the score is


def test_another_method(enough: Enough) -> None:
    assert enough("--sizes=16", "--seeds=1", "--adapter=LoRAConfig", "--adapter.rank=4") == 0
    assert config("n16-seed0")["adapter"]["init_args"]["rank"] == 4
    cli = DataCLI(["fit", "--config", "study/n16-seed0/run.yaml"])  # `fit` takes what was written
    assert yaml.safe_load(cli.recipe)["adapter"]["class_path"].endswith("LoRAConfig")


def test_all_batches_may_be_said(enough: Enough) -> None:
    assert enough("--sizes=16", "--seeds=1", "--trainer.limit_train_batches=1.0") == 0


@pytest.mark.usefixtures("enough")
def test_the_folder_by_default() -> None:
    main(["enough", "--config=recipe.yaml", "--sizes=16", "--seeds=1"])
    assert Path("runs/enough/recipe/enough.html").is_file()


def test_help_is_quick() -> None:
    code = "import sys\nfrom lightning_pmss.cli import main\ntry: main(['enough', '--help'])\n"
    code += "finally: print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert found.stdout.endswith("False\n")
    assert "--validations N" in found.stdout


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--equal=steps", "--trainer.max_steps=-1", "--trainer.max_epochs=3"], (24, -1)),  # 64 / 8 batches
        (["--equal=steps", "--trainer.max_epochs=1"], (8, -1)),
        (["--equal=epochs", "--trainer.max_steps=-1", "--trainer.max_epochs=3"], (-1, 3)),
        (["--equal=epochs", "--trainer.max_steps=16"], (-1, 2)),
        (
            ["--trainer.max_steps=-1", "--trainer.max_epochs=1", "--data.train_limit=20"],
            (3, -1),
        ),  # the recipe's own amount
    ],
)
def test_equal_steps_and_epochs(enough: Enough, words: list[str], expected: tuple[int, int]) -> None:
    enough("--sizes=16,64", "--seeds=1", *words)
    trainer = config("n16-seed0")["trainer"]
    assert (trainer["max_steps"], trainer["max_epochs"]) == expected


def test_best_of_several_validations(enough: Enough, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        enough("--sizes=16", "--seeds=2", "--score=best", "--validations=3", "--trainer.accumulate_grad_batches=2") == 0
    )
    assert config("n16-seed0")["trainer"]["val_check_interval"] == 8  # 24 batches
    assert [run["score"] for run in result()["runs"]] == [0.5, 0.5]
    assert "Scores are the best of several validations" in capsys.readouterr().out
    assert enough("--sizes=16", "--seeds=2", "--score=best") == 2
    assert "validations was 3, is 10" in capsys.readouterr().err


def test_another_monitor_of_finished_runs(enough: Enough, capsys: pytest.CaptureFixture[str]) -> None:
    assert enough("--sizes=16", "--seeds=2") == 0
    assert enough("--sizes=16", "--seeds=2", "--monitor=other", "--mode=max") == 0
    assert len(started()) == 2
    assert result()["sizes"][0]["score"]["mean"] == 1.0
    assert enough("--sizes=16", "--seeds=2", "--monitor=val/los") == 2
    assert "has no score 'val/los'; it has other, val/loss" in capsys.readouterr().err


def test_where_more_is_better(
    enough: Enough, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    negative = Path("negative.py")
    negative.write_text(FAKE.read_text().replace("1 + 4 * size**-0.5", "0.9 - 2 * size**-0.5"))
    monkeypatch.setattr(process, "PROGRAM", (sys.executable, str(negative.absolute())))
    assert enough(SIZES, "--mode=max") == 0
    printed = capsys.readouterr().out
    assert "Curve: val/loss = 0.9" in printed
    assert re.search(r"= 0\.9\d* - [12]\.\d+ n\^-0\.", printed)
    assert "is expected to raise val/loss by 0.0" in printed
    found = result()["curve"]
    assert found["factor"] < 0
    assert found["asymptote_interval"][0] < found["asymptote"] < found["asymptote_interval"][1]
    assert found["doubling"]["gain"] > 0


def test_failures(enough: Enough, capsys: pytest.CaptureFixture[str]) -> None:
    fake = {"n9-seed0": "crash", "n16-seed0": "memory", "n4-seed1": "short", "n9-seed1": "nan", "n16-seed1": "refuse"}
    assert enough(SIZES, "--seeds=2", fake=fake) == 1
    printed, errors = capsys.readouterr()
    lines = "training n9-seed0\nZeroDivisionError: no more\n"
    assert f"9 examples, seed 0 failed: exit status 1. Its last lines:\n{lines}" in printed
    assert "16 examples, seed 0 failed: SIGKILL, as the kernel sends it when memory runs out" in printed
    assert "4 examples, seed 1 failed: it ended by itself; its last validation was after step 6" in printed
    assert "9 examples, seed 1: val/loss not finite" in printed
    assert "16 examples, seed 1 failed: 'val/x' is not logged in validation." in printed
    assert "5 runs have no score; everything here is without them." in printed
    assert "4 of 8 runs failed: 9 examples, seed 0; 16 examples, seed 0" in errors
    assert len(started()) == 8
    assert result()["failures"].keys() == {"n9-seed0", "n16-seed0", "n4-seed1", "n16-seed1"}
    assert enough(SIZES, "--seeds=2") == 0  # failed ones are tried again, one without a finite score has finished
    assert len(started()) == 8 + 4
    assert result()["missing"] == 1


def test_a_run_that_fails_after_its_last_validation(enough: Enough, capsys: pytest.CaptureFixture[str]) -> None:
    """Its scores are complete, its adapter is not."""
    assert enough("--sizes=9,16", "--seeds=1", fake={"n9-seed0": "after"}) == 1
    printed, errors = capsys.readouterr()
    assert (
        "9 examples, seed 0 failed: exit status 1. Its last lines:\ntraining n9-seed0\nOSError: no space left"
        in printed
    )
    assert "1 of 2 runs failed: 9 examples, seed 0" in errors
    assert [run["size"] for run in result()["runs"]] == [16]
    assert Path("study/n9-seed0/checkpoints/last.ckpt").exists()
    assert enough("--sizes=9,16", "--seeds=1") == 0
    assert started() == ["n9-seed0 anew", "n16-seed0 anew", "n9-seed0 last.ckpt"]
    assert [run["size"] for run in result()["runs"]] == [9, 16]
    assert not Path("study/n9-seed0/checkpoints").exists()


def test_a_refused_first_run_ends_the_study(enough: Enough, capsys: pytest.CaptureFixture[str]) -> None:
    assert enough(SIZES, fake={"n4-seed0": "refuse"}) == 2
    errors = capsys.readouterr().err
    assert "error: run 4 examples, seed 0: 'val/x' is not logged in validation." in errors
    assert "No other run was started. Its output: study/n4-seed0/output.log" in errors
    assert len(started()) == 1


def test_finished_runs_are_not_repeated(enough: Enough, capsys: pytest.CaptureFixture[str]) -> None:
    assert enough("--sizes=16,64", "--seeds=1") == 0
    Path("study/n16-seed0/checkpoints").mkdir()
    assert enough("--sizes=4,16,64", "--seeds=2") == 0  # sizes and seeds may be added
    assert "2 of 6 runs are finished already." in capsys.readouterr().out
    later = ["n4-seed0", "n4-seed1", "n16-seed1", "n64-seed1"]
    assert [line.split()[0] for line in started()] == ["n16-seed0", "n64-seed0", *later]
    assert not Path("study/n16-seed0/checkpoints").exists()


def test_a_half_run_goes_on(enough: Enough, capsys: pytest.CaptureFixture[str]) -> None:
    assert enough("--sizes=16", "--seeds=3", fake={"n16-seed1": "crash", "n16-seed2": "crash"}) == 1
    folder = Path("study/n16-seed1")
    (folder / "checkpoints").mkdir()
    for name, time in (("last.ckpt", 10), ("last-interrupted.ckpt", 20)):
        (folder / "checkpoints" / name).touch()
        os.utime(folder / "checkpoints" / name, (time, time))
    Path("study/n16-seed2/progress").write_text("3 12")
    capsys.readouterr()
    assert enough("--sizes=16", "--seeds=3") == 0
    printed = capsys.readouterr().out
    assert "[2/3] 16 examples, seed 1: goes on from last-interrupted.ckpt" in printed
    assert "[3/3] 16 examples, seed 2: starts anew, no checkpoint to go on from" in printed
    assert started()[-2:] == ["n16-seed1 last-interrupted.ckpt", "n16-seed2 anew"]
    loggers = [config(run)["trainer"]["logger"]["class_path"] for run in ("n16-seed1", "n16-seed2")]
    assert [path.rpartition(".")[2] for path in loggers] == ["ContinuedCSVLogger", "CSVLogger"]


def test_a_run_interrupted_in_its_last_validation_goes_on_from_before_it(enough: Enough) -> None:
    """From a checkpoint with all steps nothing would be validated. The run knows its 11, the command estimates 12."""
    words = ["--sizes=16", "--seeds=1", "--equal=epochs", "--trainer.max_steps=48"]
    assert enough(*words, fake={"n16-seed0": "validation"}) == 1
    assert enough(*words) == 0
    assert started() == ["n16-seed0 anew", "n16-seed0 last.ckpt"]


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGKILL])
def test_stopped_in_the_middle(enough: Enough, tmp_path: Path, by: signal.Signals) -> None:
    """After Ctrl-C and after a kill the run has saved its checkpoint, and the same command goes on from it."""
    code = (
        f"import sys\nfrom lightning_pmss.runs import process\nprocess.PROGRAM = (sys.executable, {str(FAKE)!r})\n"
        "from lightning_pmss.cli import main\n"
        "main(['enough', '--config', 'recipe.yaml', '--output', 'study', '--sizes=4,16', '--seeds=1'])"
    )
    environment = {**os.environ, "FAKE": json.dumps({"n16-seed0": "wait"})}
    with Program(["-c", code], env=environment, cwd=tmp_path, stream=True) as program:
        for line in program.stdout:
            if line.startswith("[2/2]"):
                break
        wait_for(Path("study/n16-seed0/progress").exists)
        program.send_signal(by)
        assert program.wait(60) == (130 if by is signal.SIGINT else -signal.SIGKILL)
        rest = program.stdout.read()
    for message in ("stopping after this step, to save a checkpoint", "stopped. The same command continues the study."):
        assert (message in rest) == (by is signal.SIGINT)
    wait_for(Path("study/n16-seed0/checkpoints/last-interrupted.ckpt").exists)
    assert enough("--sizes=4,16", "--seeds=1") == 0
    assert started() == ["n4-seed0 anew", "n16-seed0 anew", "n16-seed0 last-interrupted.ckpt"]


def test_bound_to_its_recipe(enough: Enough, capsys: pytest.CaptureFixture[str]) -> None:
    assert enough("--sizes=16", "--seeds=1") == 0
    for words, message in (
        (["--pmss.rank=17"], "recipe.pmss.rank was 256, is 17"),
        (["--trainer.max_steps=13"], "recipe.trainer.max_steps was 12, is 13; steps was 12, is 13"),
        (
            ["--data.val_size=9"],
            "recipe.data.init_args.val_size was 10, is 9; data.validation was 10, is 9; data.fingerprints",
        ),
        (["--by=none"], "train_limit_by was kind, is None"),
        (["--equal=epochs", "--trainer.max_steps=16"], "equal was steps, is epochs"),
    ):
        assert enough("--sizes=16", "--seeds=1", *words) == 2
        assert message in capsys.readouterr().err
    assert len(started()) == 1


def test_a_folder_of_something_else(enough: Enough, capsys: pytest.CaptureFixture[str]) -> None:
    Path("study").mkdir()
    Path("study/mine.txt").touch()
    assert enough("--sizes=16") == 2
    assert "study has mine.txt and is no study's folder. Name another one: --output." in capsys.readouterr().err
    Path("study/study.json").write_text("{}")
    assert enough("--sizes=16") == 2
    assert "is not the description of a study" in capsys.readouterr().err


def test_kinds(enough: Enough, capsys: pytest.CaptureFixture[str]) -> None:
    assert enough("--sizes=16", "--seeds=1", "--by=none") == 0
    assert config("n16-seed0")["data"]["init_args"]["train_limit_by"] is None
    assert "subsets are drawn at random" in capsys.readouterr().out
    assert enough("--sizes=16", "--by=topic") == 2
    assert "give --data.train_limit_by kind" in capsys.readouterr().err


EARLY = '[{"class_path": "EarlyStopping", "init_args": {"monitor": "val/loss"}}]'


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sizes=50,20,50"], "--sizes 50,20,50: sizes increase, each is there once; type --sizes 20,50."),
        (["--sizes=5,5"], "type --sizes 5."),
        (["--sizes=5,x"], "--sizes 5,x: give numbers of examples with commas, such as --sizes 50,200,800,3200."),
        (["--sizes=0,5"], "--sizes 0,5: give numbers of examples"),
        (["--sizes=16,60,65,99"], "99 examples are more than the 64 to train on (without 10 for validation); type --sizes 16"),
        (["--sizes=16", "--seeds=0"], "--seeds 0: give at least 1"),
        (["--sizes=16", "--validations=0"], "--validations 0: give at least 1."),
        (["--sizes=16", "--score=best", "--validations=1"], "--validations 1: give at least 2."),
        (["--sizes=16", "--trainer.mx_steps=3"], "Did you mean --trainer.max_steps?"),
        (["--sizes=16", "--data.path=x"], "path"),
        (["--sizes=16", "--data.val_size=0"], "there are no validation examples to score on; give --data.val_size 200."),
        (["--sizes=16", "--equal=epochs"], "the recipe ends after 1.50 epochs (12 steps); give whole ones, such as"),
        (["--sizes=16", "--trainer.max_steps=-1", "--trainer.max_epochs=-1"], "this recipe has no end, or no step"),
        (["--sizes=16", "--trainer.max_steps=0"], "this recipe has no end, or no step"),
        (["--sizes=16", "--seed_everything=-1"], "--seed_everything -1: the seeds of runs count up from it; give"),
        (["--sizes=16", "--seeds=2", "--seed_everything=4294967295"], "from it; give a number from 0 to 4294967294."),
        (["--sizes=16", "--trainer.limit_train_batches=0.5"], "--trainer.limit_train_batches 0.5: --sizes limits"),
        (["--sizes=16", "--trainer.limit_train_batches=1"], "leave the option out, or type 1.0."),
        (["--sizes=16", "--trainer.max_time=00:01:00:00"], "--trainer.max_time 00:01:00:00: runs have the same length"),
        (["--sizes=16", f"--trainer.callbacks={EARLY}"], "the recipe has EarlyStopping, so runs of different sizes would end"),
        (["--sizes=16", "--data=lightning.pytorch.demos.boring_classes.BoringDataModule"], "BoringDataModule has no"),
        (["--sizes=16", "--ckpt_path=last"], "--ckpt_path: every run begins at the base model."),
    ],
)  # fmt: skip
def test_refused(enough: Enough, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert enough(*words) == 2
    assert message in capsys.readouterr().err
    assert not Path("study").exists()


def test_a_locked_study(enough: Enough, capsys: pytest.CaptureFixture[str]) -> None:
    from lightning_pmss.store.disk import held

    Path("study").mkdir()
    with held(Path("study"), ""):
        assert enough("--sizes=16", "--seeds=1") == 2
    assert "another process works on the study study" in capsys.readouterr().err


def test_without_data(capsys: pytest.CaptureFixture[str], tiny_tokenizer: str) -> None:
    with pytest.raises(SystemExit):
        main(["enough", "--sizes=16", "--model=CausalLMModule", f"--model.model_name_or_path={tiny_tokenizer}"])
    assert "no --data was given; enough takes data modules of this library" in capsys.readouterr().err
