"""The same bad input to every data module: an error that names file, row and remedy, before anything is trained."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from lightning_pmss.datamodules import (
    CommonsenseDataModule,
    DROPDataModule,
    Example,
    GSM8KDataModule,
    InstructionDataModule,
)
from lightning_pmss.datamodules.instruction import Split

SPANS = {"number": "", "date": {}, "spans": ["Carr"]}
ROWS: dict[str, tuple[type[InstructionDataModule], dict[str, Any]]] = {
    "gsm8k": (GSM8KDataModule, {"question": "1 + 1?", "answer": "So 2.\n#### 2"}),
    "metamath": (GSM8KDataModule, {"query": "1 + 1?", "response": "The answer is: 2", "type": "GSM_SV"}),
    "math": (GSM8KDataModule, {"problem": "1 + 1?", "solution": "$\\boxed{2}$"}),
    "pissa": (GSM8KDataModule, {"instruction": "1 + 1?", "output": "The answer is: 2"}),
    "drop": (DROPDataModule, {"passage": "Carr threw.", "question": "Who threw?", "answer": SPANS}),
    "drop_spans": (DROPDataModule, {"passage": "Carr.", "question": "Who?", "answers_spans": {"spans": ["Carr"]}}),
    "drop_text": (
        DROPDataModule,
        {"context": "Passage: P.\nQuestion: Q?\nAnswer:", "completion": "Carr", "ref_text": "Carr|Roberts"},
    ),
    "commonsense": (
        CommonsenseDataModule,
        {
            "instruction": "Please answer the following question with true or false, question: is it?",
            "input": "",
            "output": "the correct answer is true",
            "answer": "true",
        },
    ),
}
HUB = {"gsm8k": "openai/gsm8k", "drop": "EleutherAI/drop", "commonsense": "zwhe99/commonsense_170k"}
# The columns that a row cannot do without or with another type in.
NEEDED = [
    (kind, column)
    for kind, (_, row) in ROWS.items()
    for column in row
    if column not in ("input", "type")
]  # fmt: skip


@pytest.fixture
def build(tiny_tokenizer: str, tmp_path: Path) -> Any:
    def build(kind: str, path: Path | str, **kwargs: Any) -> InstructionDataModule:
        options: dict[str, Any] = {"val_size": 0, "cache_dir": str(tmp_path / "cache"), **kwargs}
        return ROWS[kind][0](tiny_tokenizer, str(path), str(path), **options)  # type: ignore[arg-type]

    return build


def _lines(kind: str, third: Any) -> str:
    """Two good rows of a kind, and a third line."""
    good = json.dumps(ROWS[kind][1])
    return f"{good}\n{good}\n{third if isinstance(third, str) else json.dumps(third)}\n"


@pytest.mark.parametrize("kind", ROWS)
def test_good_rows_are_good(build: Any, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(_lines(kind, ROWS[kind][1]))
    module = build(kind, path)
    module.prepare_data()
    module.setup()
    assert len(module.data["train"]) == len(module.data["test"]) == 3
    module.train_dataloader()
    copy = pickle.loads(pickle.dumps(module))  # noqa: S301
    assert {split: rows[:] for split, rows in copy.data.items()} == {s: rows[:] for s, rows in module.data.items()}
    assert next(iter(copy.test_dataloader()))["target"] == next(iter(module.test_dataloader()))["target"]


@pytest.mark.parametrize(("kind", "column"), NEEDED)
@pytest.mark.parametrize("bad", ["missing", "", "  ", None, 7, ["x"]])
def test_columns(build: Any, tmp_path: Path, kind: str, column: str, bad: Any) -> None:
    row = dict(ROWS[kind][1])
    if bad == "missing":
        del row[column]
    else:
        row[column] = bad
    path = tmp_path / "rows.jsonl"
    path.write_text(_lines(kind, row))
    with pytest.raises(ValueError, match=r"rows\.jsonl:3: .*\S") as error:
        build(kind, path).prepare_data()
    if bad == "missing":
        assert f"no column '{column}'" in str(error.value) or "no column" in str(error.value)


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize(
    ("third", "message"),
    [
        ('{"a": ', r":3: not valid JSON \(.* at column \d+\)"),
        ("no json at all", r":3: not valid JSON"),
        ("[1, 2]", r":3: expected a JSON object .*, got list"),
        ("null", r":3: expected a JSON object .*, got NoneType"),
        ("{}", r":3: no column .*columns are"),
    ],
)
def test_broken_lines(build: Any, tmp_path: Path, kind: str, third: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(_lines(kind, third))
    with pytest.raises(ValueError, match=message):
        build(kind, path).prepare_data()


@pytest.mark.parametrize("kind", ROWS)
def test_bytes_that_are_no_text(build: Any, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(_lines(kind, '{"x": "caf?"}').encode().replace(b'?"}', b'\xe9"}'))
    with pytest.raises(ValueError, match=r"rows\.jsonl:3: not UTF-8 \(byte 0xe9 .*Save the file as UTF-8"):
        build(kind, path).prepare_data()
    compressed = tmp_path / "packed.jsonl"
    compressed.write_bytes(b"\x1f\x8b\x08\x00")
    with pytest.raises(ValueError, match=r"packed\.jsonl:1: not UTF-8"):
        build(kind, compressed).prepare_data()


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize(("name", "content"), [("rows.jsonl", ""), ("rows.jsonl", "\n\n"), ("rows.json", "[]")])
def test_empty_files(build: Any, tmp_path: Path, kind: str, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=r"(?i)no .*(examples|questions)"):
        build(kind, tmp_path / name).prepare_data()


@pytest.mark.parametrize("kind", HUB)
def test_unreachable_hub(build: Any, kind: str) -> None:
    with pytest.raises(
        ConnectionError, match=rf"Could not load '{HUB[kind]}' from the hub .*pass local files: --data\."
    ):
        build(kind, HUB[kind]).prepare_data()


@pytest.mark.parametrize("kind", HUB)
def test_unknown_style_and_task(build: Any, kind: str) -> None:
    with pytest.raises(ValueError, match=r"prompt_style='alpaca'\)`: give --data\.prompt_style plain or --data"):
        build(kind, "x.jsonl", prompt_style="alpaca")
    with pytest.raises(ValueError, match=r"squad.*boolq"):
        build("commonsense", "x.jsonl", tasks=["squad"])


@pytest.mark.parametrize("kind", ["drop", "drop_spans", "drop_text"])
def test_passages_longer_than_the_context(build: Any, tmp_path: Path, kind: str) -> None:
    row = json.loads(json.dumps(ROWS[kind][1]).replace("Passage: P.", "Passage: " + "word " * 200))
    row |= {"passage": "word " * 200} if "passage" in row else {}
    path = tmp_path / "rows.jsonl"
    path.write_text(_lines(kind, row))
    module = build(kind, path, max_length=100)
    with pytest.warns(UserWarning, match=r"1 of 3 training examples are longer than max_length 100 .*left out"):
        module.setup()
    assert (module.dropped, len(module.data["train"]), len(module.data["test"])) == (1, 2, 3)
    with pytest.raises(ValueError, match=r"row 2 the first with \d+; raise --data\.max_length to \d+"):
        build(kind, path, max_length=100, too_long="error").setup("fit")
    module = build(kind, path, max_length=100, too_long="cut_prompt")
    with pytest.warns(UserWarning, match=r"1 of 3 prompts of the \w+ set lose their beginning"):
        module.setup()
    assert module.cut == {"train": 1, "val": 0, "test": 1} or module.cut == {"train": 1, "test": 1}


class Given(InstructionDataModule):
    """Hands out whatever a test puts in."""

    found: Any = None

    def load_examples(self, split: Split) -> Any:
        return None if split == "val" else self.found


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([Example("q", "r"), ("q", "r")], r"`Given\.load_examples\('train'\)`: example 1 is .*must be an Example"),
        ([Example("q", "")], "example 0"),
        ([Example(" ", "r")], "example 0"),
        ([Example("q", 7)], "two texts that are not empty"),  # type: ignore[arg-type]
        ([], "`Given` has no training examples"),
        (None, "`Given` has no training examples"),
    ],
)
def test_a_custom_task_that_returns_rubbish(tiny_tokenizer: str, tmp_path: Path, found: Any, message: str) -> None:
    module = Given(tiny_tokenizer, cache_dir=str(tmp_path))
    module.found = found
    with pytest.raises(ValueError, match=message):
        module.setup("fit")
