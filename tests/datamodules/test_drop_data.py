"""DROP's four formats, its prompts, and what is refused, with file and row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_pmss.datamodules import DROPDataModule
from lightning_pmss.datamodules.drop import DROPQuestion, _from_rows, read_drop
from lightning_pmss.metrics import DROPScore

NO_DATE = {"day": "", "month": "", "year": ""}


def _answer(number: str = "", spans: list[str] | None = None, **date: str) -> dict[str, Any]:
    return {"number": number, "date": {**NO_DATE, **date}, "spans": spans or []}


PASSAGES = {
    "nfl_1": {
        "passage": "Carr threw to Crabtree and Roberts. ",
        "qa_pairs": [
            {
                "question": " Who caught? ",
                "query_id": "a",
                "answer": _answer(spans=["Crabtree", "Roberts"]),
                "validated_answers": [_answer(spans=["Roberts"]), _answer(spans=["Crabtree", "Roberts"]), _answer()],
            },
            {"question": "How many?", "query_id": "b", "answer": _answer("2")},
            {"question": "When?", "query_id": "c", "answer": _answer(month="May", year="1939")},
        ],
    }
}
QUESTIONS = [
    DROPQuestion(
        "Carr threw to Crabtree and Roberts. ", "Who caught?", [["Crabtree", "Roberts"], ["Roberts"]], "spans"
    ),
    DROPQuestion("Carr threw to Crabtree and Roberts. ", "How many?", [["2"]], "number"),
    DROPQuestion("Carr threw to Crabtree and Roberts. ", "When?", [[" May 1939"]], "date"),
]
CONTEXT = {
    "context": "Passage: P.\nQuestion: Odd?\nQuestion: Q?\nAnswer:",
    "completion": " b c",
    "ref_text": "a|b c|  1939",
}


@pytest.fixture
def build(tiny_tokenizer: str, tmp_path: Path) -> Any:
    (tmp_path / "data").mkdir()
    for name in ("train", "dev"):
        (tmp_path / "data" / f"drop_dataset_{name}.json").write_text(json.dumps(PASSAGES))

    def build(path: str | Path = tmp_path / "data", **kwargs: Any) -> DROPDataModule:
        options = {"val_size": 0, "cache_dir": str(tmp_path / "cache"), **kwargs}
        return DROPDataModule(tiny_tokenizer, str(path), **options)

    return build


def test_original_format(build: Any, tmp_path: Path) -> None:
    assert read_drop(tmp_path / "data" / "drop_dataset_dev.json") == QUESTIONS
    module = build()
    module.prepare_data()
    module.setup()
    row = module.data["test"][0]
    assert row["prompt"] == "Passage: Carr threw to Crabtree and Roberts. \nQuestion: Who caught?\nAnswer:"
    assert module.encoder.tokenizer.decode(row["response_ids"]) == " Crabtree; Roberts<|endoftext|>"
    assert row["target"] == [["Crabtree", "Roberts"], ["Roberts"]]
    assert module.encoder.tokenizer.decode(module.data["train"][2]["response_ids"]) == " May 1939<|endoftext|>"
    # Predictions equal to the responses score full, with the separator only.
    preds = ["Crabtree; Roberts", "2", "May 1939"]
    for separator, exact in ((None, 200 / 3), ("; ", 100)):
        metric = DROPScore(separator=separator)
        metric.update(preds, module.data["test"]["target"][:])
        assert metric.compute()["exact_match"] == pytest.approx(exact)


def test_flat_rows_and_validated_answers_as_columns() -> None:
    pairs = PASSAGES["nfl_1"]["qa_pairs"]
    flat: list[dict[str, Any]] = [
        {"passage": PASSAGES["nfl_1"]["passage"], **pair} for pair in pairs if isinstance(pair, dict)
    ]
    validated = flat[0]["validated_answers"]
    # `datasets` stores a list of objects as an object of lists.
    flat[0]["validated_answers"] = {key: [answer[key] for answer in validated] for key in ("number", "date", "spans")}
    flat[1]["validated_answers"] = {"number": [], "date": [], "spans": []}
    assert list(_from_rows([("x", row) for row in flat])) == QUESTIONS


def test_spans_without_structure() -> None:
    row = {"passage": "P", "question": "Q", "answers_spans": {"spans": ["a", "b", "a"], "types": ["span"] * 3}}
    assert list(_from_rows([("x", row)])) == [DROPQuestion("P", "Q", [["a"], ["b"]])]


def test_context_rows(build: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(CONTEXT) + "\n" + json.dumps({**CONTEXT, "completion": " a"}) + "\n")
    questions = read_drop(path)
    # The completion comes first; the question starts behind the last mark.
    assert questions[0] == DROPQuestion("P.\nQuestion: Odd?", "Q?", [["b c"], ["a"], ["  1939"]])
    assert questions[1].answers[0] == ["a"]


@pytest.mark.parametrize(
    ("style", "prompt", "response"),
    [
        ("plain", "Passage: P\nQuestion: Q\nAnswer:", " a; b<|endoftext|>"),
        ("quanta", "Passage: P\nQuestion: Q\nAnswer:", " a\n<|endoftext|>"),
        ("lm_eval", "P Q", " a; b<|endoftext|>"),
        (
            "chat",
            "<|im_start|>user\nPassage: P\nQuestion: Q<|endoftext|>\n<|im_start|>assistant\n",
            "a; b<|endoftext|>",
        ),
    ],
)
def test_styles(build: Any, tmp_path: Path, style: str, prompt: str, response: str) -> None:
    path = tmp_path / "rows.jsonl"
    row = {"passage": "P", "question": "Q ", "answer": _answer(spans=["a", "b"])}
    path.write_text(json.dumps(row) + "\n")
    module = build(path, test_path=str(path), prompt_style=style)
    module.setup()
    for split in ("train", "test"):
        assert module.data[split][0]["prompt"] == prompt
        assert module.encoder.tokenizer.decode(module.data[split][0]["response_ids"]) == response


def test_parquet(build: Any, tmp_path: Path) -> None:
    from datasets import Dataset

    row = {"passage": "P", "question": "Q", "answer": _answer("4"), "validated_answers": [_answer("5")]}
    Dataset.from_list([row] * 3).to_parquet(str(tmp_path / "rows.parquet"))
    assert read_drop(tmp_path / "rows.parquet") == [DROPQuestion("P", "Q", [["4"], ["5"]], "number")] * 3
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match=r"broken\.parquet: not a readable parquet file"):
        read_drop(tmp_path / "broken.parquet")


def _passages(pair: Any, passage: Any = "P") -> dict[str, Any]:
    return {"nfl_1": {"passage": passage, "qa_pairs": [pair]}}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", _passages({"question": "Q"}), r"passage 'nfl_1' question 0: no column 'answer'"),
        ("a.json", _passages({"question": " ", "answer": _answer("1")}), "question 0: the question is ' '"),
        ("a.json", _passages({"question": "Q", "answer": _answer()}), "question 0: no gold answer that is not blank"),
        ("a.json", _passages({"question": "Q", "answer": "4"}), "an answer is '4'; it must be an object"),
        ("a.json", _passages({"question": "Q", "answer": {}}), "question 0: the answer {} has neither 'number'"),
        ("a.json", _passages({}, passage=""), "passage 'nfl_1': the passage is ''"),
        ("a.json", {"x": {"passage": "P", "qa_pairs": {}}}, "qa_pairs is dict; it must be a list"),
        ("a.json", {"x": [1]}, "expected a JSON object with passage and qa_pairs, got list"),
        ("a.json", {}, "no questions in this file"),
        ("a.json", "[{}", r"a\.json:1: not valid JSON"),
        ("a.json", '{"a": 1}\n{"a": 2}', r"a\.json:2: not valid JSON \(Extra data .*name the file \.jsonl"),
        ("a.json", [{"passage": "P"}], r"a\.json row 0: no column 'question'; found \['passage'\]"),
        ("a.jsonl", {**CONTEXT, "context": "What?"}, r"a\.jsonl:1: the context 'What\?'... is not of the form"),
        ("a.jsonl", {**CONTEXT, "ref_text": "||"}, "the ref_text '||' holds no answer".replace("|", r"\|")),
        ("a.jsonl", {"context": "x"}, "no column 'completion' and 'ref_text'"),
        ("a.jsonl", {"passage": "P", "question": "Q", "answers_spans": {"spans": "a"}}, "the spans are 'a'"),
        ("a.jsonl", {"passage": "P", "question": "Q", "answers_spans": {"spans": [" "]}}, "no gold answer"),
    ],
)
def test_bad_files(build: Any, tmp_path: Path, name: str, content: Any, message: str) -> None:
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=message):
        build(path).prepare_data()


def test_bad_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'{\n"caf\xe9": 1}')
    with pytest.raises(ValueError, match=r"a\.json:2: not UTF-8 \(byte 0xe9 at position 5"):
        read_drop(path)


def test_missing_data(build: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"Give --data\.path a folder with drop_dataset_train\.json"):
        build(tmp_path / "nowhere.json").prepare_data()
    with pytest.raises(FileNotFoundError, match=r"Give --data\.test_path"):
        build(test_path=str(tmp_path / "nowhere.json")).prepare_data()
    with pytest.raises(ConnectionError, match=r"Could not load 'EleutherAI/drop' from the hub .*--data\.path FOLDER"):
        build("EleutherAI/drop").prepare_data()
    with pytest.raises(ValueError, match="separator=' '"):
        build(separator=" ")


def test_real_files(build: Any, shared: Path) -> None:
    folder = shared / "data" / "drop"
    assert [len(read_drop(folder / name)) for name in ("drop_fixture.json", "drop_v0_dev_250.jsonl")] == [19, 250]
    module = build(
        folder / "drop_v0_train_from_dev_2000.jsonl",
        test_path=str(folder / "drop_v0_dev_250.jsonl"),
        prompt_style="quanta",
        too_long="cut_prompt",
        max_length=10_000,
    )
    module.setup()
    assert len(module.data["train"]) == 2007
    lines = (folder / "drop_v0_dev_250.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    # Byte for byte the prompts that the file has.
    assert module.data["test"]["prompt"][:] == [row["context"] for row in rows]
    metric = DROPScore()
    metric.update([row["completion"].strip() for row in rows], module.data["test"]["target"][:])
    assert metric.compute()["exact_match"] == 100
