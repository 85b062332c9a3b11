"""A study is a pure function of what is asked and what is finished."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments.driver import RECORDS, read_records
from experiments.pictures import smoothed_difference
from experiments.statistics import mean, paired
from experiments.study import Study, half_decade, identity, read_study
from experiments.tables import difference_table, final_table, sweep_table

STUDIES = sorted((Path(__file__).resolve().parents[2] / "experiments" / "studies").glob("*.yaml"))
ASKED: dict[str, Any] = {
    "asks": "?",
    "budget_minutes": 1,
    "common": {"model": "tiny", "task": {"name": "pairs", "size": 4}, "steps": 2},
    "sweep": {"evaluate": ["val"]},
    "final": {"seeds": [1, 2], "evaluate": ["test"]},
    "arms": [{"name": "pmss", "rank": 4, "lr": [1e-3, "1e-2"]}, {"name": "lora", "rank": 1, "lr": [1e-3]}],
    "compare": [["pmss 4", "lora 1"]],
}


def _study(tmp_path: Path, **changes: Any) -> Study:
    path = tmp_path / "asked.yaml"
    path.write_text(yaml.safe_dump(copy.deepcopy(ASKED) | changes))
    return read_study(path)


def _record(spec: dict[str, Any], **scores: float) -> dict[str, Any]:
    return {
        "spec": spec,
        "scores": scores,
        "status": "finished",
        "seconds": 30.0,
        "trainable": 10,
        "saved_bytes": 1000,
        "seconds_per_step": 0.5,
    }


@pytest.mark.parametrize(
    ("lr", "steps", "expected"), [(1e-3, 1, 3e-3), (3e-3, 1, 1e-2), (1e-2, -1, 3e-3), (0.3, 1, 1.0), (1.0, 1, 3.0)]
)
def test_half_decades(lr: float, steps: int, expected: float) -> None:
    assert half_decade(lr, steps) == expected


def test_a_sweep_goes_on_past_an_end_and_then_to_the_final(tmp_path: Path) -> None:
    arms = [ASKED["arms"][0], {"name": "lora", "rank": 1, "lr": [1e-3, 3e-3]}, {"name": "full", "lr": [1e-3]}]
    study = _study(tmp_path, arms=arms)
    records: dict[str, Any] = {}
    loss = {("pmss", 1e-3): 3.0, ("pmss", 1e-2): 2.0, ("pmss", 3e-2): 2.5, ("lora", 1e-3): 2.0}
    rates: dict[str, list[float]] = {"pmss": [], "lora": [], "full": []}
    for _ in range(20):
        if not (specs := study.next_runs(records)):
            break
        for spec in specs:
            name = spec["method"]["name"]
            phase = "val/loss" if spec["evaluate"] == ["val"] else "test/loss"
            if phase == "val/loss":
                rates[name].append(spec["lr"])
            value = loss.get((name, spec["lr"]), 9.0) + 0.1 * spec["seed"]
            records[identity(spec)] = _record(spec, **{phase: value})
    assert rates["pmss"] == [1e-3, 1e-2, 3e-2]
    assert rates["lora"] == [1e-3, 3e-3, 3e-4]
    assert rates["full"] == [1e-3]  # one rate is no sweep
    final = study.finished(study.arms[0], "final", records)
    assert [(r["spec"]["lr"], r["spec"]["seed"]) for r in final] == [(1e-2, 1), (1e-2, 2)]
    assert "2.150 ± 0.635" in final_table(study, records)  # 0.05 sqrt(2) 12.706 / sqrt(2)
    assert "**2.000**" in sweep_table(study, records)
    assert "| +0.000 ± 0.000" in difference_table(study, records)
    assert "Not run" not in final_table(study, records)


def test_a_difference_beyond_noise_is_bold_and_what_was_not_run_is_named(tmp_path: Path) -> None:
    study = _study(tmp_path, arms=[*ASKED["arms"], {"name": "full", "lr": [1e-3]}], extend=0)
    records = {}
    for _ in range(2):
        for spec in study.next_runs(records):
            name = spec["method"]["name"]
            if spec["evaluate"] == ["val"]:
                records[identity(spec)] = _record(spec, **{"val/loss": 1.0})
            elif name != "full":
                score = (2.0 if name == "pmss" else 1.0) + 1e-3 * spec["seed"] * (name == "pmss")
                records[identity(spec)] = _record(spec, **{"test/loss": score})
    assert re.search(r"\| pmss 4 - lora 1 +\| \*\*\+1\.00\d ± 0\.006\*\* +\| 2 ", difference_table(study, records))
    assert final_table(study, records).endswith("Not run with these seeds: full.")


def test_a_diverged_rate_is_never_the_best(tmp_path: Path) -> None:
    study = _study(tmp_path, extend=0)
    arm = study.arms[0]
    specs = {spec["lr"]: spec for spec in study.next_runs({}) if spec["method"]["name"] == "pmss"}
    records = {
        identity(specs[1e-3]): _record(specs[1e-3], **{"val/loss": 5.0}),
        identity(specs[1e-2]): _record(specs[1e-2]) | {"status": "diverged"},
    }
    assert study.best_rate(arm, records) == 1e-3
    assert "diverged" in sweep_table(study, records)


def test_an_arm_has_the_last_word(tmp_path: Path) -> None:
    arm = {"name": "base", "lr": [1], "run": {"steps": 0, "task": {"size": 9}}}
    study = _study(tmp_path, arms=[arm], compare=[], sweep={"steps": 1})
    (spec,) = study.next_runs({})
    assert spec["steps"] == 0
    assert spec["task"] == {"name": "pairs", "size": 9}


def test_the_names_of_finished_runs_stay() -> None:
    for path in sorted(RECORDS.rglob("*.json"))[::50]:
        assert identity(json.loads(path.read_text(encoding="utf-8"))["spec"]) == path.stem


def test_the_name_of_a_run_depends_on_all_of_it(tmp_path: Path) -> None:
    spec = _study(tmp_path).next_runs({})[0]
    names = {
        identity(spec),
        identity(spec | {"steps": 3}),
        identity(spec | {"flat": 0.05}),
        identity(spec | {"task": spec["task"] | {"size": 5}}),
    }
    assert len(names) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sweeps": 1}, r"unknown keys \['sweeps'\]"),
        ({"arms": [{"name": "lorra", "rank": 1, "lr": [1]}]}, "'lorra' is not known; choose one of"),
        ({"arms": [{"name": "lora", "rank": 1}]}, "no learning rates"),
        ({"arms": [*ASKED["arms"], ASKED["arms"][0]]}, "'pmss 4' stands for two arms"),
        ({"compare": [["pmss 4", "lora 2"]]}, "'lora 2', which is no arm"),
        ({"show": ["frontiers"]}, "show names 'frontiers'; choose of"),
        ({"sweep": {"seed": [0]}}, r"unknown keys \['seed'\]"),
        ({"arms": [ASKED["arms"][0] | {"run": {"optimizer": "lion"}}], "compare": []}, "'lion'; choose one of"),
        ({"arms": [ASKED["arms"][0] | {"run": {"flat": 0}}], "compare": []}, "flat is 0; give FlatLoRA's sigma"),
        ({"common": {"model": "tiny", "task": {"name": "gsm9k"}, "steps": 1}}, "'gsm9k'; choose one of"),
    ],
)
def test_what_a_study_refuses(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _study(tmp_path, **changes)


def test_paired_differences_are_students() -> None:
    from scipy.stats import ttest_rel

    a = [_record({"seed": s}, x=v) for s, v in enumerate([1.0, 2.0, 4.0])]
    b = [_record({"seed": s}, x=v) for s, v in enumerate([0.5, 1.9, 3.0])]
    found = paired(a, b, "x")
    low, high = ttest_rel([1.0, 2.0, 4.0], [0.5, 1.9, 3.0]).confidence_interval(0.95)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))
    assert str(mean([1.0])) == "1.000"


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
def test_committed_studies_read(path: Path) -> None:
    study = read_study(path)
    assert study.arms
    assert len({identity(spec) for spec in study.next_runs({})}) == len(study.next_runs({}))


def test_every_committed_record_belongs_to_a_study_and_names_no_place() -> None:
    records = read_records(RECORDS)
    asked = set()
    for path in STUDIES:
        study = read_study(path)
        for arm in study.arms:
            for phase in ("sweep", "final"):
                asked |= {identity(r["spec"]) for r in study.finished(arm, phase, records)}
    assert set(records) == asked
    for file in RECORDS.rglob("*.json"):
        assert '"/' not in file.read_text()  # no absolute path


def test_the_smoothed_difference_of_two_curves() -> None:
    falling = [10.0 - step for step in range(8)]
    found = smoothed_difference(falling, [9.0 - step for step in range(8)])
    assert found == [(3.0, 1.0), (4.0, 1.0), (5.0, 1.0), (6.0, 1.0)]  # windows of five; steps count from 1
    assert smoothed_difference([3.0, 5.0], [1.0, 1.0]) == [(1.5, 3.0)]
    assert [value for _, value in smoothed_difference(falling, [0.0] * 8)] == [8.0, 7.0, 6.0, 5.0]
