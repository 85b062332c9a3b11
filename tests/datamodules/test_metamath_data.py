"""MetaMathQA, PiSSA's copy of it, MATH and MetaMath's backward questions through ``GSM8KDataModule``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_pmss.datamodules import GSM8KDataModule
from lightning_pmss.datamodules.gsm8k import read_jsonl
from lightning_pmss.metrics import MATHAccuracy, MetaMathAccuracy

METAMATH = [
    {"query": f"Q{i}?", "response": f"It is {i}.\nThe answer is: {i}", "type": kind, "original_question": "x"}
    for i, kind in enumerate(["GSM_Rephrased", "MATH_AnsAug", "GSM_SV", "MATH_FOBAR", "GSM_AnsAug", "GSM_FOBAR"])
]
MATH = [{"problem": "P", "level": "Level 1", "type": "Algebra", "solution": "So $\\boxed{\\frac{1}{2}}$."}]
GOOD = '{"question": "1 + 1?", "answer": "#### 2"}\n'


@pytest.fixture
def build(tiny_tokenizer: str, tmp_path: Path) -> Any:
    (tmp_path / "metamath.json").write_text(json.dumps(METAMATH))
    (tmp_path / "test.jsonl").write_text(GOOD)

    def build(path: str | Path = tmp_path / "metamath.json", **kwargs: Any) -> GSM8KDataModule:
        options = {"val_size": 0, "cache_dir": str(tmp_path / "cache"), **kwargs}
        return GSM8KDataModule(tiny_tokenizer, str(path), **options)

    return build


@pytest.mark.parametrize(
    ("types", "first_rows", "questions"),
    [
        (None, None, ["Q0?", "Q1?", "Q2?", "Q3?", "Q4?", "Q5?"]),
        (None, 2, ["Q0?", "Q1?"]),
        ("GSM_", None, ["Q0?", "Q2?", "Q4?", "Q5?"]),
        (["MATH_"], 1, ["Q1?"]),
        (["GSM_SV", "GSM_FOBAR"], 10, ["Q2?", "Q5?"]),
    ],
)
def test_types_and_first_rows(build: Any, types: Any, first_rows: int | None, questions: list[str]) -> None:
    examples = build(types=types, first_rows=first_rows).load_examples("train")
    assert [example.question for example in examples] == questions


def test_train_on_metamath_test_on_gsm8k(build: Any, tmp_path: Path) -> None:
    module = build(test_path=str(tmp_path / "test.jsonl"), prompt_style="metamath")
    module.prepare_data()
    module.setup()
    row = module.data["train"][0]
    assert row["prompt"].endswith("### Instruction:\nQ0?\n\n### Response:")
    assert module.encoder.tokenizer.decode(row["response_ids"]) == "It is 0.\nThe answer is: 0<|endoftext|>"
    row = module.data["test"][0]
    assert row["prompt"].endswith("### Instruction:\n1 + 1?\n\n### Response: Let's think step by step.")
    metric = MetaMathAccuracy()
    metric.update(["The answer is: 2"], [row["target"]])
    assert metric.compute() == 1
    with pytest.raises(ValueError, match="no test examples"):
        build().setup("test")


def test_math_and_its_parquet(build: Any, tmp_path: Path) -> None:
    from datasets import Dataset

    (tmp_path / "math").mkdir()
    for name in ("train", "test"):
        Dataset.from_list(MATH * 2).to_parquet(str(tmp_path / "math" / f"{name}.parquet"))
    module = build(tmp_path / "math")
    module.setup("test")
    metric = MATHAccuracy()
    metric.update(["The answer is: \\frac12", "The answer is: 0.5"], module.data["test"]["target"][:])
    assert metric.compute() == 1


def test_pissas_copy(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"instruction": "Q", "output": "The answer is: 4", "type": "metamath"}))
    assert read_jsonl(path)[0][:2] == ("Q", "The answer is: 4")


def test_answers_without_an_end(build: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [METAMATH[0], {**METAMATH[1], "response": "It is one."}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.warns(UserWarning, match="1 of 2 training answers of .* end without a final answer"):
        assert len(build(path).load_examples("train")) == 2
    # A test set with such an answer could not be scored.
    with pytest.raises(ValueError, match=r"a\.jsonl:2: the answer ends in 'It is one.', without a final 'The answer"):
        build(test_path=str(path)).load_examples("test")
    path.write_text(json.dumps({**MATH[0], "solution": "\\boxed{"}))
    with pytest.raises(ValueError, match=r"without a final answer in \\boxed"):
        build(test_path=str(path)).load_examples("test")


def test_bad_input(build: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"query": "x", "response": "y"}))
    with pytest.raises(ValueError, match=r"a\.jsonl:1: no column 'type'; .* MetaMathQA's columns"):
        build(path, types="GSM_").prepare_data()
    with pytest.raises(ValueError, match="no examples of type XYZ_ in this file"):
        build(types="XYZ_").prepare_data()
    with pytest.raises(ValueError, match="first_rows=0"):
        build(first_rows=0)
    with pytest.raises(ConnectionError, match=r"'meta-math/MetaMathQA' from the hub"):
        build("meta-math/MetaMathQA").prepare_data()
    assert build("meta-math/MetaMathQA").load_examples("test") is None


def test_backward_questions(build: Any, shared: Path) -> None:
    examples = build(test_path=str(shared / "data" / "metamath" / "GSM8K_Backward.jsonl")).load_examples("test")
    assert len(examples) == 1270
    assert examples[0].response == "80000"
