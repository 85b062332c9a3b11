"""Seven examples on two processes: scores, texts and records are those of one device; a stopped run goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.launch import launch
from tests.evaluation.script import main

pytestmark = [pytest.mark.distributed]
STRATEGIES = ("ddp", "fsdp2")
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 2, "stop": ["e"]},
    "choice": {"answer_by": "likelihood"},
}
FORMATS = {"boolq": "true/false", "piqa": "solution1/solution2", "ARC-Easy": "answer1/answer2/answer3/answer4"}
OPENINGS = {
    "boolq": "Please answer the following question with true or false, question: ",
    "piqa": "Please choose the correct solution to the question: ",
    "ARC-Easy": "Please choose the correct answer to the question: ",
}


@pytest.fixture(scope="module")
def task(tiny_llama: str, fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A model whose texts vary, five rows with two to four labels, and a cache."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("evaluation")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    model.save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder / "model")
    rows = []
    for number, name in enumerate(("boolq", "ARC-Easy", "piqa", "ARC-Easy", "boolq")):
        label = FORMATS[name].split("/")[number % 2]
        asked = f"{OPENINGS[name]}{'why ' * number}?\n\nAnswer format: {FORMATS[name]}"
        rows.append({"instruction": asked, "input": "", "output": f"the correct answer is {label}", "answer": label})
    (folder / "gsm8k").mkdir()
    questions = (fixtures / "gsm8k" / "train.jsonl").read_text().splitlines()[:7]
    for split in ("train", "test"):
        (folder / "gsm8k" / f"{split}.jsonl").write_text("\n".join(questions) + "\n")
    (folder / "choices.json").write_text(json.dumps(rows))
    return {
        "model": str(folder / "model"),
        "data": str(folder / "gsm8k"),
        "choices": str(folder / "choices.json"),
        "cache": str(folder / "cache"),
    }


def tasks(strategy: str, parent: Path, task: dict[str, Any]) -> list[dict[str, Any]]:
    common = {**task, "strategy": strategy}
    return [{**common, "folder": str(parent / name), "options": options} for name, options in OPTIONS.items()]


@pytest.fixture(scope="module")
def single(task: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    parent = tmp_path_factory.mktemp("single")
    main(tasks("single", parent, task))
    return parent


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predictions-test.jsonl").read_text().splitlines()]


def logged(folder: Path, rank: int = 0) -> dict[str, Any]:
    return json.loads((folder / f"rank{rank}.json").read_text())


@pytest.fixture(scope="module")
def double(task: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All strategies in one launch: most of its time is imports."""
    parent = tmp_path_factory.mktemp("double")
    work = []
    for strategy in STRATEGIES:
        stopped = {**task, "strategy": strategy, "folder": str(parent / strategy / "stopped")}
        both = [{**stopped, "options": {"stop_after": 1}}, stopped]
        work += [*tasks(strategy, parent / strategy, task), *both]
    launch("tests.evaluation.script", work)
    return parent


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_equal_one(strategy: str, single: Path, double: Path) -> None:
    parent = double / strategy
    assert 0 < logged(single / "greedy")["logged"]["test/exact_match"] < 1, "a score of all or nothing tests little"
    for name in (*OPTIONS, "stopped"):
        alone = single / ("greedy" if name == "stopped" else name)
        expected = logged(alone)["logged"]
        for rank in (0, 1):
            found = logged(parent / name, rank)["logged"]
            scores = [key for key in expected if key != "test/loss"]
            assert {key: found[key] for key in scores} == {key: expected[key] for key in scores}
            assert found["test/loss"] == pytest.approx(expected["test/loss"], rel=1e-5)
        free = {"loss", "likelihoods"}  # rounded by the order of sums
        for row, other in zip(rows(parent / name), rows(alone), strict=True):
            assert {k: v for k, v in row.items() if k not in free} == {k: v for k, v in other.items() if k not in free}
        summaries = [json.loads((folder / "summary-test.json").read_text()) for folder in (parent / name, alone)]
        assert summaries[0]["scores"] == summaries[1]["scores"]
        assert summaries[0]["run"] == summaries[1]["run"]  # also where the model is in parts
        assert sorted(p.name for p in (parent / name).glob("predictions-test.*")) == [
            "predictions-test.jsonl",
            "predictions-test.runs.json",
        ]
    # Rank 0 had answered ids 0 and 2, rank 1 id 1 (its line for 3 was cut off): 3, 4, 5 and 6 are left.
    assert json.loads((parent / "stopped" / "summary-test.json").read_text())["answered_before"] == 3
