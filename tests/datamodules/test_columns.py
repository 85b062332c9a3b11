"""A column that says something is read, known to say nothing, left out on purpose, or an error that names it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ArgumentParser

from lightning_pmss.datamodules import (
    CommonsenseDataModule,
    DROPDataModule,
    GSM8KDataModule,
    InstructionDataModule,
)
from lightning_pmss.datamodules.columns import filled
from lightning_pmss.datamodules.commonsense_hub import to_llm_adapters
from lightning_pmss.datamodules.gsm8k import read_jsonl
from lightning_pmss.datamodules.rows import read_rows
from lightning_pmss.datamodules.splits import read_shots

DATE = {"day": "", "month": "", "year": ""}
GOLD = {"number": "4", "date": DATE, "spans": [], "worker_id": "w", "hit_id": "h"}
CHOICE = "Please choose the correct solution to the question: Q?"
FORMATS: dict[str, tuple[type[InstructionDataModule], dict[str, Any]]] = {
    "gsm8k": (GSM8KDataModule, {"question": "1 + 1?", "answer": "#### 2"}),
    "metamath": (
        GSM8KDataModule,
        {"query": "1 + 1?", "response": "The answer is: 2", "type": "GSM_SV", "original_question": "one and one?"},
    ),
    "math": (
        GSM8KDataModule,
        {"problem": "1 + 1?", "solution": "$\\boxed{2}$", "type": "Algebra", "level": "Level 1"},
    ),
    "math500": (
        GSM8KDataModule,
        {
            "problem": "1 + 1?",
            "solution": "$\\boxed{2}$",
            "answer": "2",
            "subject": "Algebra",
            "level": 2,
            "unique_id": "test/algebra/1.json",
        },
    ),
    "pissa": (GSM8KDataModule, {"instruction": "1 + 1?", "output": "The answer is: 2", "type": "metamath"}),
    "backward": (
        GSM8KDataModule,
        {"question": "x + 1 = 2?", "output": "so 1", "original_question": "1 + 1?", "answer": "1"},
    ),
    "drop": (
        DROPDataModule,
        {
            "section_id": "nfl_1",
            "query_id": "q",
            "passage": "P.",
            "question": "How many?",
            "answer": GOLD,
            "validated_answers": {"number": ["4"], "date": [DATE], "spans": [[]], "worker_id": [""], "hit_id": ["h"]},
        },
    ),
    "drop_spans": (
        DROPDataModule,
        {
            "section_id": "nfl_1",
            "query_id": "q",
            "passage": "P.",
            "question": "Who?",
            "answers_spans": {"spans": ["Carr"], "types": ["span"]},
        },
    ),
    "drop_texts": (
        DROPDataModule,
        {"context": "Passage: P.\nQuestion: Q?\nAnswer:", "completion": "Carr", "ref_text": "Carr|Roberts"},
    ),
    "commonsense": (
        CommonsenseDataModule,
        {
            "instruction": CHOICE,
            "input": "",
            "output": "the correct answer is solution1",
            "answer": "solution1",
            "task": "piqa",
        },
    ),
}


@pytest.fixture
def load(tiny_tokenizer: str, tmp_path: Path) -> Any:
    def load(kind: str, rows: list[dict[str, Any]], **kwargs: Any) -> Any:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        module = FORMATS[kind][0](tiny_tokenizer, str(path), **kwargs)  # type: ignore[call-arg]
        return module.load_examples("train")

    return load


@pytest.mark.parametrize("kind", FORMATS)
def test_published_rows_and_what_tells_rows_apart(load: Any, kind: str) -> None:
    row = FORMATS[kind][1]
    extra = {"id": 7, "source": "web", "__index_level_0__": 0}
    assert load(kind, [row, {**row, **extra}])[0] == load(kind, [row])[0]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("column", ["system", "hint", "passage_2", "Question", "history"])
def test_a_filled_column_that_nothing_reads_is_named(load: Any, kind: str, column: str) -> None:
    row = FORMATS[kind][1]
    expected = load(kind, [row])
    # Filled in one row of several: that row is named.
    with pytest.raises(
        ValueError,
        match=rf"rows\.jsonl:3: the column '{column}' is filled \('Mind the gap'\).*--data\.ignore_columns '\[{column}\]'",
    ):
        load(kind, [row, {**row, column: None}, {**row, column: "Mind the gap"}])
    assert load(kind, [{**row, column: "Mind the gap"}], ignore_columns=[column]) == expected
    assert load(kind, [{**row, column: "Mind the gap"}], ignore_columns=column) == expected
    for empty in (None, "", " \n", [], {}, {"a": [None, ""]}, float("nan")):
        assert load(kind, [{**row, column: empty}]) == expected


def test_alpaca_rows_lose_no_input(load: Any) -> None:
    rows = [
        {"instruction": "1 + 1?", "input": "", "output": "The answer is: 2"},
        {"instruction": "Add these.", "input": "3 and 4", "output": "The answer is: 7"},
    ]
    assert [example.question for example in load("pissa", rows[:1])] == ["1 + 1?"]
    told = (
        "rows.jsonl:2: the column 'input' is filled ('3 and 4'), and pissa-dataset reads 'instruction' and 'output' alone."
        " Put what it says into these columns, or leave it out on purpose: --data.ignore_columns '[input]'."
    )
    with pytest.raises(ValueError, match=f"{re.escape(told)}$"):
        load("pissa", rows)


@pytest.mark.parametrize("kind", ["gsm8k", "drop", "commonsense"])
@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"messages": [{"role": "user", "content": "Q?"}]}, "chat messages"),
        ({"conversations": [{"from": "human", "value": "Q?"}]}, "ShareGPT conversations"),
        ({"prompt": "Q?", "completion": "A"}, "prompts and completions"),
        ({"text": "Q? A"}, "plain texts"),
    ],
)
def test_layouts_of_others_are_known_by_name(load: Any, kind: str, row: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=rf"rows\.jsonl:1: no column .*These look like {told}.*examples/custom_task"):
        load(kind, [row])
    # Beside the columns of a format they are a column too many.
    (name, *_) = row
    with pytest.raises(ValueError, match=rf"'{name}'"):
        load(kind, [{**FORMATS[kind][1], **row}])


def test_a_format_is_known_by_what_it_needs(load: Any) -> None:
    both = {**FORMATS["gsm8k"][1], "instruction": "Add.", "output": "The answer is: 2"}
    with pytest.raises(
        ValueError, match="columns 'question' and 'answer' are filled .*and pissa-dataset reads 'instruction'"
    ):
        load("gsm8k", [both])
    assert load("gsm8k", [both], ignore_columns=["instruction", "output"])[0].question == "1 + 1?"
    assert load("gsm8k", [both], ignore_columns=["question", "answer"])[0].question == "Add."
    # Columns that are there and empty, as where data sets were joined, make no format.
    assert load("gsm8k", [{**both, "question": None, "answer": None}])[0].question == "Add."
    with pytest.raises(ValueError, match=r"answers_spans' is filled"):
        load("drop", [{**FORMATS["drop"][1], "answers_spans": {"spans": ["5"]}}])


def test_missing_columns(load: Any) -> None:
    with pytest.raises(ValueError, match="no column 'question' and 'answer'.*Rename 'Question' to 'question'"):
        load("gsm8k", [{"Question": "1 + 1?", "Answer": "#### 2"}])
    with pytest.raises(ValueError, match="no column 'answer'.*It is in ignore_columns: take 'answer' out"):
        load("gsm8k", [FORMATS["gsm8k"][1]], ignore_columns=["answer"])


def test_columns_inside_of_columns(load: Any) -> None:
    row = FORMATS["drop"][1]
    unit = {**row, "answer": {**GOLD, "unit": "yards"}}
    with pytest.raises(ValueError, match=r"the column 'answer\.unit' is filled \('yards'\).*'\[answer\.unit\]'"):
        load("drop", [unit])
    assert load("drop", [unit], ignore_columns=["answer.unit"]) == load("drop", [row])
    spans = {**FORMATS["drop_spans"][1], "answers_spans": {"spans": ["Carr"], "notes": ["?"]}}
    with pytest.raises(ValueError, match=r"'answers_spans\.notes' is filled"):
        load("drop_spans", [spans])
    validated = {**row, "validated_answers": [{**GOLD, "unit": "yards"}]}
    with pytest.raises(ValueError, match=r"'validated_answers\.unit' is filled"):
        load("drop", [validated])
    for lists in ({"number": ["4", "5"], "spans": [[]]}, {"number": ["4"], "note": "x"}):
        with pytest.raises(ValueError, match=r"rows\.jsonl:1: the validated_answers are .* lists of equal length"):
            load("drop", [{**row, "validated_answers": lists}])


def test_the_original_layout_of_drop(tiny_tokenizer: str, tmp_path: Path) -> None:
    entry: dict[str, Any] = {
        "passage": "P.",
        "wiki_url": "http://x",
        "qa_pairs": [{"question": "Q?", "answer": GOLD, "query_id": "a", "passage_id": "nfl_1"}],
    }
    path = tmp_path / "drop.json"

    def load(**kwargs: Any) -> Any:
        path.write_text(json.dumps({"nfl_1": entry}))
        return DROPDataModule(tiny_tokenizer, str(path), **kwargs).load_examples("train")

    expected = load()
    entry["title"] = "A game"
    with pytest.raises(ValueError, match=r"passage 'nfl_1': the column 'title' is filled"):
        load()
    entry["qa_pairs"][0]["hint"] = "Count."
    with pytest.raises(ValueError, match=r"question 0: the column 'qa_pairs\.hint' is filled"):
        load(ignore_columns="title")
    assert load(ignore_columns=["title", "qa_pairs.hint"]) == expected


# The columns of the hub's data sets beside those that the texts are made of.
HUB: dict[str, dict[str, Any]] = {
    "boolq": {"question": "is it so", "passage": "P", "answer": True},
    "piqa": {"goal": "Do it.", "sol1": "a", "sol2": "b", "label": 1},
    "social_i_qa": {"context": "C.", "question": "Q?", "answerA": "a", "answerB": "b", "answerC": "c", "label": "3"},
    "hellaswag": {
        "ind": 24,
        "activity_label": "Run",
        "ctx_a": "A",
        "ctx_b": "man",
        "ctx": "A man",
        "endings": ["a", "b", "c", "d"],
        "source_id": "s",
        "split": "val",
        "split_type": "indomain",
        "label": "0",
    },
    "winogrande": {"sentence": "_ ran.", "option1": "Al", "option2": "Bo", "answer": "2"},
    "ARC-Easy": {"id": "1", "question": "Q?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"},
    "openbookqa": {
        "id": "1",
        "question_stem": "Q",
        "choices": {"text": ["a", "b"], "label": ["A", "B"]},
        "answerKey": "A",
        "fact1": "F",
        "humanScore": 1.0,
        "clarity": 1.6,
        "turkIdAnonymized": "t",
    },
}


@pytest.mark.parametrize("task", HUB)
def test_rows_of_the_hub(task: str) -> None:
    expected = to_llm_adapters(task, "x", HUB[task])
    with pytest.raises(ValueError, match="x: the column 'hint' is filled"):
        to_llm_adapters(task, "x", {**HUB[task], "hint": "H"})
    assert to_llm_adapters(task, "x", {**HUB[task], "hint": "H"}, ["hint"]) == expected


def test_worked_examples(tmp_path: Path) -> None:
    path = tmp_path / "shots.jsonl"
    path.write_text(json.dumps({"question": "Q", "response": "R", "system": "S"}) + "\n")
    with pytest.raises(ValueError, match="the column 'system' is filled"):
        read_shots(str(path), 1)
    assert len(read_shots(str(path), 1, ["system"])) == 1


def test_a_key_twice_would_lose_a_value(tmp_path: Path) -> None:
    line = '{"question": "1 + 1?", "answer": "#### 2", "answer": "#### 3"}'
    (tmp_path / "a.jsonl").write_text(line)
    with pytest.raises(ValueError, match=r"a\.jsonl:1: an object has the key 'answer' more than once"):
        read_jsonl(tmp_path / "a.jsonl")
    (tmp_path / "a.json").write_text(f"[{line}]")
    with pytest.raises(ValueError, match=r"a\.json: an object has the key 'answer' more than once"):
        list(read_rows(tmp_path / "a.json"))


def test_gold_answers_that_the_two_rules_read_differently(load: Any, tiny_tokenizer: str, tmp_path: Path) -> None:
    row = {"question": "Q?", "answer": "#### 9{,}500"}
    assert load("gsm8k", [row])  # to train on
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: the answer ends in '#### 9\{,\}500', without the final line"):
        read_jsonl(tmp_path / "rows.jsonl")


def test_filled() -> None:
    assert all(map(filled, ("x", 0, False, ["", 0], {"a": {"b": "x"}}, b"")))
    assert not any(map(filled, (None, "", "\t", [], [None, " "], {"a": []}, float("nan"))))


@pytest.mark.parametrize(
    ("typed", "columns"), [("[input, answer.unit]", ("input", "answer.unit")), ("input", ("input",))]
)
def test_on_the_command_line(typed: str, columns: tuple[str, ...]) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(GSM8KDataModule, "data")
    parsed = parser.parse_args(["--data.tokenizer", "x", "--data.ignore_columns", typed])
    assert parser.instantiate_classes(parsed).data.ignore_columns == columns


def test_real_files(shared: Path, tiny_tokenizer: str) -> None:
    data = shared / "data"
    assert len(read_jsonl(data / "metamath" / "GSM8K_Backward.jsonl")) == 1270  # two layouts in one file
    module = CommonsenseDataModule(tiny_tokenizer, str(data / "commonsense" / "train_mix_3000.json"))
    assert len(module.load_examples("train") or ()) == 3000
