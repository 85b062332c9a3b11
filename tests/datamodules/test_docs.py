"""docs/data.md shows each prompt style byte for byte."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from lightning_pmss.datamodules import CommonsenseDataModule, DROPDataModule, GSM8KDataModule, InstructionDataModule

DOCS = Path(__file__).resolve().parents[2] / "docs" / "data.md"
KINDS: dict[str, type[InstructionDataModule]] = {
    "GSM8K": GSM8KDataModule,
    "DROP": DROPDataModule,
    "commonsense": CommonsenseDataModule,
}
LINE = re.compile(r"^(\w+) (\w+) (train|test): (.*)$", re.MULTILINE)


def _shown() -> dict[tuple[str, str, str], tuple[str, str]]:
    found = {}
    for name, style, split, texts in LINE.findall(DOCS.read_text(encoding="utf-8")):
        both = ast.parse(texts, mode="eval").body
        assert isinstance(both, ast.BinOp)
        found[name, style, split] = (ast.literal_eval(both.left), ast.literal_eval(both.right))
    return found


def test_every_style_is_shown() -> None:
    styles = {(name, style) for name, kind in KINDS.items() for style in ("plain", *kind.styles)}
    assert {key[:2] for key in _shown()} == styles


@pytest.mark.parametrize("name", KINDS)
def test_what_is_shown_is_what_is_tokenised(name: str, tiny_tokenizer: str, tmp_path: Path) -> None:
    rows = {
        "GSM8K": '{"question": "Q?", "answer": "R #### 1"}',
        "DROP": '{"passage": "P.", "question": "Q?", "answer": {"number": "", "spans": ["a", "b"], "date": {}}}',
        "commonsense": '{"instruction": "Please choose the correct solution to the question: Q?", "input": "",'
        ' "output": "the correct answer is solution1", "answer": "solution1"}',
    }
    path = tmp_path / "rows.jsonl"
    path.write_text(rows[name] + "\n", encoding="utf-8")
    compared = 0
    for (kind, style, split), texts in _shown().items():
        if kind != name:
            continue
        files = {"path": str(path), "test_path": str(path), "cache_dir": str(tmp_path)}
        module = KINDS[name](tiny_tokenizer, prompt_style=style, val_size=0, max_length=512, **files)
        module.setup("fit" if split == "train" else "test")
        row = module.data[split][0]  # type: ignore[index]
        decode = module.encoder.tokenizer.decode
        assert (decode(row["prompt_ids"]), decode(row["response_ids"])) == (texts[0], texts[1] + "<|endoftext|>")
        compared += 1
    assert compared >= 2 * 3
