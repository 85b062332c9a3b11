"""GSM8K's files: what is read and what is refused, with file and line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lightning_pmss.datamodules import GSM8KDataModule
from lightning_pmss.datamodules.gsm8k import read_jsonl, strip_annotations

GOOD = '{"question": "1 + 1?", "answer": "#### 2"}\n'


@pytest.fixture
def build(tiny_tokenizer: str, fixtures: Path, tmp_path: Path) -> Any:
    def build(path: str | Path = fixtures / "gsm8k", **kwargs: Any) -> GSM8KDataModule:
        options = {"val_size": 2, "cache_dir": str(tmp_path / "cache"), **kwargs}
        return GSM8KDataModule(tiny_tokenizer, str(path), **options)

    return build


def test_folder(build: Any) -> None:
    module = build()
    module.prepare_data()
    module.setup()
    assert {split: len(data) for split, data in module.data.items()} == {"train": 6, "val": 2, "test": 3}
    row = module.data["test"][2]
    assert row["target"] == "She pays 3 * 9 = $<<3*9=27>>27.\n#### 27"
    assert row["prompt"] == "Question: Nora buys 3 books for $9 each. What does she pay?\nAnswer:"


def test_annotations_can_be_left_out(build: Any) -> None:
    module = build(keep_annotations=False)
    module.setup("test")
    assert module.data["test"][2]["target"] == "She pays 3 * 9 = $27.\n#### 27"
    assert strip_annotations("a <b> <<1+1=2>>2 << c") == "a <b> 2 << c"


def test_single_files(build: Any, fixtures: Path) -> None:
    module = build(fixtures / "gsm8k" / "train.jsonl")
    module.prepare_data()
    module.setup("fit")
    with pytest.raises(ValueError, match="no test examples"):
        module.setup("test")
    module = build(fixtures / "gsm8k" / "train.jsonl", test_path=str(fixtures / "gsm8k" / "test.jsonl"))
    module.setup("test")
    assert len(module.data["test"]) == 3


def test_empty_lines_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n\n" + GOOD.encode())
    assert len(read_jsonl(path)) == 2


def _with_line(row: dict[str, Any] | list[int] | str) -> bytes:
    return (GOOD + (row if isinstance(row, str) else json.dumps(row)) + "\n").encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_with_line('{"question": "x", "answer": "#### 1"'), r"jsonl:2: not valid JSON \(Expecting .* at column \d+\)"),
        (_with_line({"question": "x"}), r"jsonl:2: no column 'answer'; found \['question'\]"),
        (_with_line({"instruction": "x", "output": "y"}), "jsonl:2: no column 'question' and 'answer'"),
        (_with_line({"question": "x", "answer": " \n"}), r"jsonl:2: the answer is ' \\n'; .* not empty"),
        (_with_line({"question": None, "answer": "#### 1"}), "jsonl:2: the question is None"),
        (_with_line({"question": "x", "answer": 7}), "jsonl:2: the answer is 7"),
        (
            _with_line({"question": "x", "answer": "It is 7"}),
            "jsonl:2: the answer ends in 'It is 7', without the final",
        ),
        (_with_line([1, 2]), "jsonl:2: expected a JSON object with question and answer, got list"),
        (GOOD.encode() + b'{"question": "caf\xe9"}\n', r"jsonl:2: not UTF-8 \(byte 0xe9 at position 18 of the line\)"),
        (b"", "jsonl: no examples in this file"),
        (json.dumps([{"question": "x", "answer": "#### 1"}]).encode(), "jsonl:1: expected a JSON object"),
    ],
)
def test_broken_files_are_refused_before_training(
    build: Any, fixtures: Path, tmp_path: Path, content: bytes, message: str
) -> None:
    folder = tmp_path / "data"
    shutil.copytree(fixtures / "gsm8k", folder)
    (folder / "train.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        build(folder).prepare_data()


@pytest.mark.parametrize("path", ["/nowhere/data", "./nowhere", "nowhere.jsonl", "~/nowhere"])
def test_missing_paths(build: Any, path: str) -> None:
    with pytest.raises(FileNotFoundError, match="There is no file .*train.jsonl and test.jsonl"):
        build(path).prepare_data()


def test_folder_without_test_file(build: Any, fixtures: Path, tmp_path: Path) -> None:
    shutil.copy(fixtures / "gsm8k" / "train.jsonl", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"test\.jsonl"):
        build(tmp_path).prepare_data()


def test_unreachable_hub_says_how_to_pass_files(build: Any) -> None:
    with pytest.raises(ConnectionError, match=r"Could not load 'openai/gsm8k' from the hub .*--data\.path FOLDER"):
        build("openai/gsm8k").prepare_data()


def test_real_data(shared: Path, build: Any) -> None:
    folder = shared / "data" / "gsm8k"
    train, test = read_jsonl(folder / "train.jsonl"), read_jsonl(folder / "test.jsonl")
    assert (len(train), len(test)) == (7473, 1319)
    assert not [example for example in train + test if "<<" in strip_annotations(example.response)]
    module = build(folder, keep_annotations=False, test_limit=4, max_length=2000)
    module.setup("test")
    assert module.data["test"][0]["target"].endswith("#### 18")
