"""The eight commonsense tasks: LLM-Adapters' form, the hub's forms put into it, subsets, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lightning_pmss.datamodules import CommonsenseDataModule
from lightning_pmss.datamodules.commonsense import possible_tasks
from lightning_pmss.datamodules.commonsense_hub import to_llm_adapters
from lightning_pmss.metrics import CommonsenseAccuracy
from lightning_pmss.metrics.commonsense import TASKS


def _row(instruction: str, label: str, **more: str) -> dict[str, str]:
    return {
        "instruction": instruction,
        "input": "",
        "output": f"the correct answer is {label}",
        "answer": label,
        **more,
    }


BOOLQ = _row(
    "Please answer the following question with true or false, question: is it?\n\nAnswer format: true/false", "true"
)
ARC = _row("Please choose the correct answer to the question: Q?\n\nAnswer1: a Answer2: b Answer3: c", "answer3")
PIQA = _row("Please choose the correct solution to the question: Q.\n\nSolution1: a\n\nSolution2: b", "solution2")


@pytest.fixture
def build(tiny_tokenizer: str, tmp_path: Path) -> Any:
    def build(path: str | Path, **kwargs: Any) -> CommonsenseDataModule:
        options = {"val_size": 0, "cache_dir": str(tmp_path / "cache"), **kwargs}
        return CommonsenseDataModule(tiny_tokenizer, str(path), **options)

    return build


def _write(path: Path, rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return path


def test_folder_of_tasks(build: Any, tmp_path: Path) -> None:
    for task, row in (("boolq", BOOLQ), ("ARC-Easy", ARC)):
        _write(tmp_path / task / "train.json", [row, row])
        _write(tmp_path / task / "test.json", [row])
    module = build(tmp_path, tasks=["ARC-Easy", "boolq"], prompt_style="llm_adapters", loss_on="all", max_length=999)
    module.prepare_data()
    module.setup()
    assert module.data["train"]["target"][:] == [["boolq", "true"]] * 2 + [["ARC-Easy", "answer3"]] * 2
    batch = next(iter(module.test_dataloader()))
    assert batch["target"] == [["boolq", "true"], ["ARC-Easy", "answer3"]]
    assert batch["prompt"][0].endswith("Answer format: true/false\n\n" + 16 * " " + "### Response:\n" + 16 * " ")
    metric = CommonsenseAccuracy(by_task=True)
    metric.update(["the correct answer is true", "answer1"], batch["target"])
    assert {name: float(value) for name, value in metric.compute().items()} == {
        "accuracy": 0.5,
        "average": 0.5,
        "boolq": 1.0,
        "ARC-Easy": 0.0,
    }
    with pytest.raises(FileNotFoundError, match=r"piqa/train.jsonl'\. Give --data\.path commonsense_170k\.json"):
        build(tmp_path, tasks=["piqa"]).prepare_data()


def test_mixed_file_and_its_subsets(build: Any, tmp_path: Path) -> None:
    path = _write(tmp_path / "mixed.json", [BOOLQ, ARC, PIQA])
    assert [example.target[0] for example in build(path).load_examples("train")] == ["boolq", "other", "piqa"]
    assert [example.target for example in build(path, tasks=["piqa"]).load_examples("train")] == [["piqa", "solution2"]]
    with pytest.raises(ValueError, match=r"row 1: this row may belong to social_i_qa, ARC-Easy, ARC-Challenge"):
        build(path, tasks=["piqa", "ARC-Easy"]).load_examples("train")
    # Two ways to tell them apart.
    named = _write(tmp_path / "named.json", [{**BOOLQ, "task": "boolq"}, {**ARC, "task": "ARC-Easy"}])
    assert len(build(named, tasks=["ARC-Easy"]).load_examples("train")) == 1
    _write(tmp_path / "mixed_tasks.json", ["boolq", "openbookqa", "piqa"])
    assert [e.target[0] for e in build(path, tasks=["openbookqa"]).load_examples("train")] == ["openbookqa"]
    _write(tmp_path / "mixed_tasks.json", ["boolq"])
    with pytest.raises(ValueError, match=r"mixed_tasks\.json: expected a list with the tasks of the 3 rows"):
        build(path).load_examples("train")
    _write(tmp_path / "mixed_tasks.json", ["boolq", "squad", "piqa"])
    with pytest.raises(ValueError, match=r"row 1: unknown task 'squad'; the tasks are boolq"):
        build(path).load_examples("train")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**BOOLQ, "answer": "answer1"}, r"row 0: the answer is 'answer1', not one of true, false"),
        ({**BOOLQ, "output": "the correct answer is false"}, "output .* does not end in the answer 'true'"),
        ({**BOOLQ, "input": "context"}, "the input is 'context'; in the commonsense data it is empty"),
        ({**BOOLQ, "instruction": "Translate."}, "the instruction is of no known task"),
        ({**BOOLQ, "instruction": ""}, "the instruction is ''; it must be a text"),
        ({"instruction": "x"}, r"no column 'output' and 'answer'; found \['instruction'\]"),
        ("text", "expected a JSON object with instruction and output and answer, got str"),
    ],
)
def test_bad_rows(build: Any, tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(_write(tmp_path / "mixed.json", [row])).prepare_data()


def test_bad_arguments_and_missing_data(build: Any, tmp_path: Path) -> None:
    for tasks in (["squad"], [], "boolq"):
        with pytest.raises(ValueError, match=r"--data\.tasks '\[boolq, piqa\]'"):
            build(tmp_path, tasks=tasks)
    with pytest.raises(ConnectionError, match=r"'zwhe99/commonsense_170k'.*--data\.path commonsense_170k\.json"):
        build("zwhe99/commonsense_170k").prepare_data()
    with pytest.raises(ConnectionError, match=r"'google/boolq'.*--data\.test_path FOLDER"):
        build(_write(tmp_path / "m.json", [BOOLQ])).load_examples("test")
    with pytest.raises(FileNotFoundError, match=r"Give --data\.test_path a folder with <task>/test\.json"):
        build(tmp_path, test_path=str(tmp_path / "nowhere.json")).load_examples("test")
    with pytest.raises(ValueError, match="No train examples of piqa"):
        build(_write(tmp_path / "m.json", [BOOLQ]), tasks=["piqa"]).load_examples("train")


# Rows in the columns of the data sets' cards; the texts are those of LLM-Adapters' files.
HUB: dict[str, tuple[dict[str, Any], str, str]] = {
    "boolq": (
        {"question": "is it so", "passage": "P", "answer": False},
        "Please answer the following question with true or false, question: is it so?\n\nAnswer format: true/false",
        "false",
    ),
    "piqa": (
        {"goal": "Do it.", "sol1": "a", "sol2": "b", "label": 1},
        "Please choose the correct solution to the question: Do it.\n\nSolution1: a\n\nSolution2: b\n\n"
        "Answer format: solution1/solution2",
        "solution2",
    ),
    "social_i_qa": (
        {"context": "C.", "question": "Q?", "answerA": "a", "answerB": "b", "answerC": "c", "label": "3"},
        "Please choose the correct answer to the question: C. Q?\n\nAnswer1: a Answer2: b Answer3: c\n\n"
        "Answer format: answer1/answer2/answer3",
        "answer3",
    ),
    "hellaswag": (
        {"activity_label": "Run", "ctx": "A man", "endings": ["a", "b", "c", "d"], "label": "0"},
        "Please choose the correct ending to complete the given sentence: Run: A man\n\n"
        "Ending1: a Ending2: b Ending3: c Ending4: d\n\nAnswer format: ending1/ending2/ending3/ending4",
        "ending1",
    ),
    "winogrande": (
        {"sentence": "_ ran.", "option1": "Al", "option2": "Bo", "answer": "2"},
        "Please choose the correct answer to fill in the blank to complete the given sentence: _ ran.\n\n"
        "Option1: Al Option2: Bo Answer format: option1/option2",
        "option2",
    ),
    "ARC-Easy": (
        {"id": "1", "question": "Q?", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"},
        "Please choose the correct answer to the question: Q?\n\nAnswer1: a Answer2: b\n\nAnswer format: answer1/answer2",
        "answer2",
    ),
    "openbookqa": (
        {"question_stem": "Q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"},
        "Please choose the correct answer to the question: Q\n\nAnswer1: a Answer2: b\n\nAnswer format: answer1/answer2",
        "answer1",
    ),
}
HUB["ARC-Challenge"] = HUB["ARC-Easy"]


@pytest.mark.parametrize("task", TASKS)
def test_hub_rows_in_llm_adapters_form(task: str) -> None:
    row, instruction, label = HUB[task]
    assert to_llm_adapters(task, "x", row) == _row(instruction, label)
    assert task in possible_tasks(instruction)
    first = next(iter(row)) if task != "ARC-Easy" else "answerKey"
    if first not in ("id",):
        with pytest.raises(ValueError, match=rf"x: no column '{first}'"):
            to_llm_adapters(task, "x", {key: value for key, value in row.items() if key != first})
    if "choices" in row:
        with pytest.raises(ValueError, match="x: not a row of"):
            to_llm_adapters(task, "x", {**row, "answerKey": "Z"})


def test_real_files(build: Any, shared: Path) -> None:
    folder = shared / "data" / "commonsense"
    module = build(folder / "train_mix_3000.json", test_path=str(folder / "hellaswag" / "test.json"))
    assert Counter(example.target[0] for example in module.load_examples("train"))["winogrande"] == 967
    tasks = [task for task in TASKS if task != "winogrande"]
    examples = build(folder, tasks=tasks).load_examples("test")
    assert Counter(example.target[0] for example in examples) == dict.fromkeys(tasks, 300)
    # LLM-Adapters' own texts have the forms that the hub's rows are put into.
    for example in examples:
        choices = example.question.split("Answer format: ")[1].split("/")
        assert example.target[1] in choices
        assert example.target[0] in possible_tasks(example.question)
