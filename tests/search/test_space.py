"""The file of a search space: what it may contain, what is drawn from it, and how it is typed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml

from lightning_pmss.search.sampler import sampler
from lightning_pmss.search.space import METHOD, Space, arguments, read_space, space_of

CONTENT = {
    "options": {
        "model.optimizer.lr": {"low": "1e-4", "high": 1e-2, "log": True},
        "data.batch_size": {"choice": [4, 8]},
        "pmss.target_modules": {"choice": ["all-linear", ["q_proj", "v_proj"]]},
        "model.warmup_ratio": {"low": 0.0, "high": 0.2, "step": 0.1},
        "data.seed": 3,
    },
    "methods": {
        "PMSS": {"pmss.rank": {"low": 4, "high": 64, "int": True, "log": True}, "adapter": None},
        "LoRA": {"adapter.rank": {"choice": [2, 4]}, "adapter": "LoRAConfig"},
    },
}


def drawn(space: Space, count: int, name: str = "random", seed: int = 0) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    study = optuna.create_study(sampler=sampler(name, space, seed))
    found = []
    for _ in range(count):
        trial = study.ask()
        settings = space.draw(trial)
        found.append((settings, trial.params))
        study.tell(trial, 1.0)
    return found


def test_what_is_drawn_is_inside_and_each_method_has_its_own_options() -> None:
    space = space_of(CONTENT, "it")
    seen = drawn(space, 200)
    for settings, params in seen:
        own = {"PMSS": {"adapter", "pmss.rank"}, "LoRA": {"adapter", "adapter.rank"}}[params[METHOD]]
        assert set(settings) == set(CONTENT["options"]) | own
        assert settings["data.seed"] == 3
        assert space.settings(params) == settings
    rates = [settings["model.optimizer.lr"] for settings, _ in seen]
    assert 1e-4 <= min(rates) < 2e-4 < 5e-3 < max(rates) <= 1e-2
    assert 70 < sum(rate < 1e-3 for rate in rates) < 130  # half of them below the middle of the logarithms
    assert {settings["model.warmup_ratio"] for settings, _ in seen} == {0.0, 0.1, 0.2}
    assert {str(settings["pmss.target_modules"]) for settings, _ in seen} == {"all-linear", "['q_proj', 'v_proj']"}
    ranks = [settings["pmss.rank"] for settings, _ in seen if "pmss.rank" in settings]
    assert all(isinstance(rank, int) for rank in ranks)
    assert {4, 64} <= set(range(4, 65)) >= set(ranks)
    assert sum(rank < 16 for rank in ranks) > len(ranks) / 3  # log
    assert all(list(settings)[0] == "adapter" for settings, _ in seen)  # its class is typed before its options


def test_values_are_typed_as_the_command_line_reads_them() -> None:
    settings = {"a": 1e-5, "b": 8, "c": None, "d": True, "e": "all-linear", "f": ["q", "v"], "g": {"x": 1}}
    typed = arguments(settings)
    assert typed == [
        "--a=1e-05",
        "--b=8",
        "--c=null",
        "--d=true",
        "--e=all-linear",
        '--f=["q", "v"]',
        '--g={"x": 1}',
    ]


def test_examples_contain_every_end_and_every_choice() -> None:
    seen = [(what, settings) for what, settings in space_of(CONTENT, "it").examples()]
    values = {(option, str(value)) for _, settings in seen for option, value in settings.items()}
    for option, shown in (("pmss.rank", "4"), ("pmss.rank", "64"), ("adapter.rank", "2"), ("adapter.rank", "4")):
        assert (option, shown) in values
    assert ("model.warmup_ratio", "0.2") in values
    assert any("of method LoRA" in what for what, _ in seen)


def test_one_method_is_no_choice() -> None:
    space = space_of({"methods": {"LoRA": CONTENT["methods"]["LoRA"]}}, "it")  # type: ignore[index]
    (settings, params), *_ = drawn(space, 3)
    assert settings["adapter"] == "LoRAConfig"
    assert list(params) == ["LoRA: adapter.rank"]
    assert space.settings(params) == settings


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "has `options:`"),
        ([1], "has `options:`"),
        ({"parameters": {}}, "'parameters' is not known"),
        ({"options": {}}, "nothing varies"),
        ({"options": {"a": 1}}, "nothing varies"),
        ({"options": [1]}, "options is no mapping"),
        ({"methods": ["LoRA"]}, "methods is no mapping"),
        ({"methods": {"LoRA": 4}}, "methods: LoRA is no mapping"),
        ({"options": {"a": {"low": 2, "high": 1}}}, "a: low 2 is not below high 1"),
        ({"options": {"a": {"low": 1, "high": 1}}}, "not below"),
        ({"options": {"a": {"low": 0, "high": 1, "log": True}}}, "log needs numbers above 0"),
        ({"options": {"a": {"low": "x", "high": 1}}}, "a: low: 'x' is no finite number"),
        ({"options": {"a": {"low": True, "high": 2}}}, "True is no finite number"),
        ({"options": {"a": {"low": 0, "high": math.inf}}}, "no finite number"),
        ({"options": {"a": {"low": 0, "high": math.nan}}}, "no finite number"),
        ({"options": {"a": {"low": 1.5, "high": 3, "int": True}}}, "1.5 is no whole number"),
        ({"options": {"a": {"low": 1, "high": 3, "int": "yes"}}}, "neither true nor false"),
        ({"options": {"a": {"low": 1, "high": 3, "step": 5}}}, "step 5 must be above 0"),
        ({"options": {"a": {"low": 1, "high": 3, "step": 1, "log": True}}}, "without log"),
        ({"options": {"a": {"low": 1}}}, "no set of values"),
        ({"options": {"a": {"low": 1, "high": 2, "lg": True}}}, "no set of values"),
        ({"options": {"a": {"choice": []}}}, "choice needs a list"),
        ({"options": {"a": {"choice": 3}}}, "choice needs a list"),
        ({"options": {"a": {"choice": [1, 2, 1]}}}, "1 is twice"),
        ({"options": {"a": {"choice": [1, True]}}}, "True is twice"),
        ({"options": {"a": {"choice": [["q"], ["q"]]}}}, "is twice"),
        ({"options": {"a.b": {"choice": [1, 2]}, "a.init_args.b": 3}}, "a.init_args.b is there twice"),
        ({"options": {"a": {"choice": [1, 2]}}, "methods": {"M": {"a": 1}}}, "a is in options and in method M"),
        ({"options": {"ckpt_path": {"choice": [1, 2]}}}, "each trial sets ckpt_path for itself"),
        ({"options": {"trainer.logger.save_dir": {"choice": [1, 2]}}}, "each trial sets trainer.logger for itself"),
        ({"options": {"pmss.output_dir": "x", "a": {"choice": [1, 2]}}}, "each trial sets pmss.output_dir"),
    ],
)
def test_what_cannot_be_searched_is_refused(content: Any, said: str) -> None:
    with pytest.raises(ValueError, match="space.yaml") as error:
        space_of(content, "space.yaml")
    assert said in str(error.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="configs/tune/default.yaml is an example"):
        read_space(tmp_path / "no.yaml")
    (tmp_path / "bad.yaml").write_text("options: {a: [1, 2\n")
    with pytest.raises(ValueError, match="bad.yaml, line 2"):
        read_space(tmp_path / "bad.yaml")
    (tmp_path / "odd.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="odd.yaml is no text"):
        read_space(tmp_path / "odd.yaml")


def test_the_random_state_is_the_trial_s_own() -> None:
    """Two workers with the same seed draw different trials, and a search that was stopped draws those it would have drawn."""
    space = space_of(CONTENT, "it")
    all_at_once = [settings for settings, _ in drawn(space, 6, "tpe")]
    assert len({str(settings) for settings in all_at_once}) == 6
    study = optuna.create_study()
    for place in range(6):  # each by a new worker
        study.sampler = sampler("tpe", space, 0)
        trial = study.ask()
        assert space.draw(trial) == all_at_once[place]
        study.tell(trial, 1.0)
    assert [settings for settings, _ in drawn(space, 6, "tpe", seed=1)] != all_at_once


def test_the_default_space_can_be_read() -> None:
    folder = Path(__file__).resolve().parents[2] / "configs" / "tune"
    for file in folder.glob("*.yaml"):
        space = read_space(file)
        assert drawn(space, 20)
        assert "Launch:" in file.read_text()
    default = yaml.safe_load((folder / "default.yaml").read_text())
    assert set(default["methods"]) == {"PMSS", "LoRA", "MiSS"}
