"""``python -m lightning_pmss tune``: what is typed, refused, printed and written; kills and Ctrl-C."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lightning_pmss.cli import main
from lightning_pmss.search.result import read_result
from tests import forks
from tests.cli.test_cli import REPOSITORY, small
from tests.processes import await_end, wait_for

SPACE = """
options:
  model.optimizer.lr: {low: 1.0e-4, high: 1.0e-1, log: true}
methods:
  PMSS: {adapter: null, pmss.rank: {choice: [2, 4]}}
  LoRA: {adapter: LoRAConfig, adapter.rank: {choice: [1, 2]}}
"""
FAKE = f"{sys.executable} {Path(__file__).with_name('fit_in_words.py')}"


def command(tiny_llama: str, folder: Path, *more: str, space: str = SPACE) -> list[str]:
    """A search with the quickstart's recipe, made small."""
    (folder / "space.yaml").write_text(space)
    own = ["tune", f"--space={folder / 'space.yaml'}", f"--output={folder / 'out'}", "--trials=4", "--finish=2"]
    return [*own, *small(tiny_llama, folder), *more]


def refused(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("space", "said"),
    [
        (
            "options: {model.optimzer.lr: {choice: [1, 2]}}",
            "model.optimzer.lr is no option .* Did you mean model.optimizer",
        ),
        ("options: {pmss.rnk: {choice: [1, 2]}}", "pmss.rnk is no option .* Did you mean pmss.rank"),
        ("options: {data.batchsize: {choice: [1, 2]}}", "data.batchsize is no option .* Did you mean data.batch_size"),
        (
            "methods: {LoRA: {adapter: LoRAConfig, adapter.rnk: {choice: [1, 2]}}}",
            "of method LoRA: adapter.rnk is no option .* Did you mean adapter.rank",
        ),
        ("options: {pmss.rank: {low: 1.5, high: 3}}", "pmss.rank does not take 1.5: .*Expected a <class 'int'>"),
        ("options: {pmss.rank: {choice: [2, many]}}", "pmss.rank does not take 'many'"),
        ("methods: {A: {adapter: LoRaConfig, adapter.rank: {choice: [1, 2]}}}", "adapter does not take 'LoRaConfig'"),
        ("options: {pmss.rank: {low: 3, high: 2}}", "low 3 is not below high 2"),
    ],
)
def test_wrong_spaces_are_refused_before_any_trial(
    tiny_llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], space: str, said: str
) -> None:
    error = refused(capsys, command(tiny_llama, tmp_path, space=space))
    assert re.search(f"space.yaml.*{said}", error), error
    assert "Subtypes" not in error
    assert not (tmp_path / "out" / "trials").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--fraction=0"], "--fraction 0 is a share of the training"),
        (["--fraction=1.2"], "at most 1"),
        (["--trials=0"], "--trials 0: give a number of trials"),
        (["--finish=-1"], "0 for none"),
        (["--study=a/b"], "a name has letters"),
        (["--storage=nonsense"], "is no URL of a database"),
        (["--ckpt_path=there.ckpt"], "the checkpoint .*there.ckpt does not exist"),
        (["--pmss.rnk=3"], "Did you mean --pmss.rank"),
        (["--sampler=grid"], "invalid choice: 'grid'"),
        (["--show=quickstart"], "There is no database"),
    ],
)
def test_wrong_options_are_refused(
    tiny_llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    assert re.search(said, refused(capsys, command(tiny_llama, tmp_path, *more)))


@pytest.mark.parametrize("seed", [-1, 2**32])
@pytest.mark.parametrize("option", ["seed", "seed_everything"])
def test_a_seed_is_refused_before_the_study_is_bound_to_it(
    tiny_llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, seed: int
) -> None:
    error = refused(capsys, command(tiny_llama, tmp_path, f"--{option}={seed}"))
    assert f"--{option} {seed}: give a number from 0 to 4294967295." in error
    assert not list((tmp_path / "out").rglob("recipe.yaml"))


@pytest.mark.parametrize(
    "recipe", ["configs/quickstart.yaml", "configs/smollm2/gsm8k.yaml", "configs/gsm8k/llama2_7b.yaml"]
)
def test_the_default_space_fits_the_recipes(recipe: str) -> None:
    from lightning_pmss.cli.recipe import Recipe
    from lightning_pmss.search.space import read_space

    parsed = Recipe(["--config", str(REPOSITORY / recipe)])
    classes = set()
    for what, settings in read_space(REPOSITORY / "configs/tune/default.yaml").examples():
        config = parsed.refuse_wrong(settings, what)
        assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == settings["model.optimizer.lr"]
        assert config["data"]["init_args"]["batch_size"] == settings["data.batch_size"]
        assert config["pmss"]["target_modules"] == settings["pmss.target_modules"]
        if config["adapter"] is not None:
            assert config["adapter"]["init_args"]["rank"] == settings["adapter.rank"]
        classes.add(config["adapter"] and config["adapter"]["class_path"].rpartition(".")[2])
    assert classes == {None, "LoRAConfig", "MiSSConfig"}


def test_a_database_that_is_away_is_refused_before_the_recipe_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lightning_pmss.cli.recipe", None)  # importing it would raise
    away = "--storage=postgresql+psycopg2://127.0.0.1:1/none"
    error = refused(capsys, command("no model", tmp_path, away))
    assert "the database cannot be used" in error


def test_without_a_space(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--space is missing" in refused(capsys, ["tune"])


def test_help_needs_no_lightning() -> None:
    code = "import sys; from lightning_pmss.cli import main\ntry: main(['tune', '--help'])\n"
    code += "except SystemExit: assert not {'torch', 'lightning', 'optuna'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.titles: list[str] = []
        self.open = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.open = tag
        assert not [value for name, value in attrs if name in ("src", "href") and not str(value).startswith("#")]

    def handle_data(self, data: str) -> None:
        if self.open == "h2":
            self.titles.append(data.strip())


def test_a_search_prints_a_table_and_writes_page_and_recipe(
    tiny_llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = command(tiny_llama, tmp_path, f"--launcher={FAKE}", "--trials=12", "--finish=12")
    main(words)
    text = capsys.readouterr()
    assert "12 of 12]" in text.out
    assert "rank correlation 1.00 (Spearman), 1.00 (Kendall). 5 of the 5 best" in text.out
    out = tmp_path / "out"
    number, settings = re.findall(r"best: trial (\d+), val/loss \S+ at the end; (.*)", text.out)[0]
    scores = {path.parent.name: read_result(path.parent) for path in (out / "trials").glob("*/result.json")}
    best = min(scores, key=lambda name: scores[name].score)  # type: ignore[union-attr, arg-type, return-value]
    assert int(best) == int(number)
    trial = yaml.safe_load((out / "trials" / best / "config.yaml").read_text())
    recipe = yaml.safe_load((out / "best.yaml").read_text())
    for name in ("model", "data", "adapter", "seed_everything"):
        assert recipe[name] == trial[name]
    kept = [callback["class_path"].rpartition(".")[2] for callback in recipe["trainer"]["callbacks"]]
    assert kept == ["LossCurve", "ModelCheckpoint"]  # of the recipe, not of the trial
    assert [c["class_path"].rpartition(".")[2] for c in trial["trainer"]["callbacks"]] == [
        "LossCurve",
        "StopAtFraction",
    ]
    assert settings.split(", ")[0] in (out / "report.html").read_text()
    page = Reader()
    page.feed((out / "report.html").read_text())
    wanted = {"History", "Early and final scores", "Trials", "Search space", "Recipe", "Importances"}
    assert wanted <= set(page.titles)
    assert {"Parallel coordinates: PMSS", "Parallel coordinates: LoRA"} <= set(page.titles)
    assert page.tags.count("svg") >= 5
    assert "Not drawn" not in (out / "report.html").read_text()
    assert yaml.safe_load((out / "space.yaml").read_text()) == yaml.safe_load(SPACE)
    show = f"import sys; from lightning_pmss.cli import main; main(['tune', '--show=quickstart', '--output={out}'])"
    alone = subprocess.run(
        [sys.executable, "-c", f"{show}; assert 'torch' not in sys.modules"], stdout=subprocess.PIPE, text=True
    )
    assert alone.returncode == 0
    shown = alone.stdout
    assert shown.splitlines()[1].split()[0] == number
    assert "Spearman" in shown
    with pytest.raises(SystemExit) as stop:  # `fit` takes the recipe by itself
        main(["fit", "--config", str(out / "best.yaml"), "--print_config"])
    assert stop.value.code in (0, None)
    printed = yaml.safe_load(capsys.readouterr().out)
    rate = printed["model"]["init_args"]["optimizer"]["init_args"]["lr"]
    assert rate == trial["model"]["init_args"]["optimizer"]["init_args"]["lr"]
    error = refused(capsys, [*words, "--data.batch_size=2"])
    assert "recipe.data.init_args.batch_size was 8, is 2" in error
    error = refused(capsys, ["tune", "--show=other", f"--output={out}"])
    assert "has no study 'other'. It has 'quickstart', 'quickstart/finish'" in error


def test_a_fraction_inside_of_the_warm_up_is_said(
    tiny_llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = [f"--launcher={FAKE}", "--trials=1", "--finish=0"]
    main(command(tiny_llama, tmp_path, *one, "--fraction=0.1", "--model.warmup_ratio=0.15"))
    assert "--fraction 0.1 ends inside of the warm-up (model.warmup_ratio up to 0.15)" in capsys.readouterr().err
    main(command(tiny_llama, tmp_path, *one, "--fraction=0.1", "--study=other", f"--output={tmp_path / 'other'}"))
    assert "warm-up" not in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_stopped_search_continues(tiny_llama: str, tmp_path: Path, number: signal.Signals, code: int) -> None:
    words = command(tiny_llama, tmp_path, f"--launcher={FAKE}")
    out = tmp_path / "out"
    out.mkdir()
    (out / "hang").touch()
    with forks.Program(["-m", "lightning_pmss", *words]) as program:
        there = out / "trials" / "0000" / "output.txt"
        wait_for(there.exists, 200)
        pid = _child_of(program.pid)
        program.send_signal(number)
        assert program.wait(60) == code
        if number != signal.SIGKILL:
            assert "stopped; the same command continues the search" in program.errors()
    await_end(pid)
    (out / "hang").unlink()
    done = forks.run(["-m", "lightning_pmss", *words])
    assert done.returncode == 0, done.stderr
    assert len(list((out / "trials").iterdir())) == 5  # four, and the one that was stopped
    assert done.stdout.count("done") == 4
    assert "2 of 2]" in done.stdout


def _child_of(pid: int) -> int:
    """The guard of the trial that a worker runs."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                try:
                    fields = (entry / "stat").read_text().rpartition(")")[2].split()
                    line = (entry / "cmdline").read_text()
                except OSError:
                    continue
                if int(fields[1]) == pid and "lightning_pmss.runs.guard" in line:
                    return int(entry.name)
        time.sleep(0.05)
    raise AssertionError("no trial runs")


@pytest.mark.slow
def test_real_trainings(tiny_llama: str, tmp_path: Path) -> None:
    """The best trial, stopped and finished, has the tensors and the score of one that was never stopped."""
    words = command(tiny_llama, tmp_path, "--trials=2", "--finish=1", "--fraction=0.5")
    done = forks.run(["-m", "lightning_pmss", *words], timeout=280, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr + done.stdout
    trials = tmp_path / "out" / "trials"
    (final,) = trials.glob("*/final-0")
    early, late = read_result(final.parent), read_result(final)
    assert early is not None
    assert late is not None
    assert (early.state, early.step, late.state, late.step) == ("stopped", 2, "ended", 4)
    assert read_result(trials / "0000").untrained is not None  # type: ignore[union-attr]
    config = yaml.safe_load((final / "config.yaml").read_text())
    whole = tmp_path / "whole"
    text = (final / "config.yaml").read_text().replace(str(final.absolute()), str(whole))
    (tmp_path / "whole.yaml").write_text(text)
    alone = forks.run(["-m", "lightning_pmss", "fit", "--config", tmp_path / "whole.yaml"])
    assert alone.returncode == 0, alone.stderr
    never = read_result(whole)
    assert never is not None
    assert never.score == late.score != early.score
    tensors = load_file(whole / "adapter" / "adapter_model.safetensors")
    assert config["trainer"]["max_steps"] == 4
    assert tensors
    for name, value in load_file(final / "adapter" / "adapter_model.safetensors").items():
        assert torch.equal(value, tensors[name]), name
    assert not list(trials.rglob("merged"))


STRATEGIES = {
    "ddp": ["--trainer.strategy=ddp"],
    "fsdp2": [f"--config={REPOSITORY / 'configs/strategy/fsdp2.yaml'}", "--trainer.strategy.data_parallel_size=2"],
    "zero2": ["--trainer.strategy=tests.distributed.strategies.CPUDeepSpeed", "--trainer.strategy.stage=2"],
}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_trainings_of_two_processes_by_a_launcher(strategy: str, tiny_llama: str, tmp_path: Path) -> None:
    """The best trial goes on from a checkpoint of all ranks, to the adapter of a training that was never stopped."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    more = [*STRATEGIES[strategy], "--trainer.devices=2", "--trials=1", "--finish=1", "--fraction=0.5"]
    words = command(tiny_llama, tmp_path, f"--launcher={' '.join(launcher)}", *more)
    done = forks.run(["-m", "lightning_pmss", *words], timeout=280)
    trial = tmp_path / "out" / "trials" / "0000"
    assert done.returncode == 0, done.stderr + done.stdout
    early, late = read_result(trial), read_result(trial / "final-0")
    assert early is not None
    assert late is not None
    assert (early.state, early.step, late.state, late.step) == ("stopped", 2, "ended", 3)  # 20 of 40 examples each
    assert early.untrained is not None
    assert late.score != early.score
    assert "MEMBER: 2/2" in (trial / "output.txt").read_text()
    config = (trial / "final-0" / "config.yaml").read_text()
    (tmp_path / "whole.yaml").write_text(config.replace(str((trial / "final-0").absolute()), str(tmp_path / "whole")))
    alone = forks.run([*launcher[1:], "-m", "lightning_pmss", "fit", "--config", tmp_path / "whole.yaml"], timeout=280)
    assert alone.returncode == 0, alone.stderr
    never = read_result(tmp_path / "whole")
    assert never is not None
    assert never.score == late.score
    resumed = load_file(trial / "final-0" / "adapter" / "adapter_model.safetensors")
    assert resumed
    for name, value in load_file(tmp_path / "whole" / "adapter" / "adapter_model.safetensors").items():
        assert torch.equal(value, resumed[name]), name
