"""GSM8K
=====

Grade-school word problems (Cobbe et al. 2021, "Training Verifiers to Solve Math Word Problems") from the hub or from
JSONL files in the published format: one object per line with ``question`` and ``answer``, whose last line is
``#### N``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from typing_extensions import override

from lightning_pmss.datamodules.instruction import Example, InstructionDataModule, Split
from lightning_pmss.metrics import GSM8KAccuracy

_ANNOTATION = re.compile(r"<<[^<>\n]*>>")
_COLUMNS = ("question", "answer")


def strip_annotations(answer: str) -> str:
    """Return ``answer`` without its calculator annotations, the ``<<48/2=24>>`` of GSM8K."""
    return _ANNOTATION.sub("", answer)


def read_jsonl(path: str | Path) -> list[Example]:
    """Read and check a JSONL file in GSM8K's format. Empty lines are skipped.

    Args:
        path: the file, in UTF-8.

    Returns:
        Its examples, in order.

    Raises:
        ValueError: If a line is not UTF-8, not a JSON object, lacks a column, or has an empty question or answer or one
            without the final ``#### N``; the message names the file and the line. Also if the file has no examples.

    """
    examples = list(_check_rows(_parse_lines(Path(path))))
    if not examples:
        raise ValueError(f"{path}: no examples in this file; it needs one JSON object per line.")
    return examples


def _parse_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            where = f"{path}:{number}"
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{where}: not UTF-8 (byte 0x{raw[error.start]:02x} at position {error.start + 1} of the line)."
                    " Save the file as UTF-8."
                ) from error
            if not line:
                continue
            try:
                yield where, json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{where}: not valid JSON ({error.msg} at column {error.colno}). Each line must be one whole object"
                    ' such as {"question": "...", "answer": "... #### 42"}.'
                ) from error


def _check_rows(rows: Iterable[tuple[str, Any]]) -> Iterator[Example]:
    for where, row in rows:
        if not isinstance(row, Mapping):
            raise ValueError(
                f"{where}: expected a JSON object with {' and '.join(_COLUMNS)}, got {type(row).__name__}."
            )
        missing = [column for column in _COLUMNS if column not in row]
        if missing:
            raise ValueError(
                f"{where}: no column {' and '.join(map(repr, missing))}; found {sorted(map(str, row))}. GSM8K's columns"
                " are 'question' and 'answer'."
            )
        for column in _COLUMNS:
            if not isinstance(row[column], str) or not row[column].strip():
                raise ValueError(f"{where}: the {column} is {row[column]!r}; it must be a text that is not empty.")
        if GSM8KAccuracy.extract(row["answer"]) is None:
            raise ValueError(
                f"{where}: the answer ends in {row['answer'][-40:]!r}, without the final line '#### N' that GSM8K's"
                " answers are scored by. Add it."
            )
        yield Example(row["question"].strip(), row["answer"].strip())


class GSM8KDataModule(InstructionDataModule):
    """GSM8K, from the hub or from local files.

    The data has train (7,473 rows) and test (1,319); validation is held out from train by ``seed``.

    Args:
        tokenizer: Folder or hub id of the model's tokenizer.
        path: Hub id (configuration "main"), or a folder with ``train.jsonl`` and ``test.jsonl``, or one JSONL file to
            train on.
        test_path: JSONL file to test on. Null: the test split of ``path``, which a single file does not have.
        keep_annotations: Keep the calculator annotations ``<<48/2=24>>`` in the answers. On by default: the text as
            published, which other results are made with, and a scratch pad for the model. Off: about a quarter fewer
            tokens per answer.
        **kwargs: Arguments of :class:`~lightning_pmss.datamodules.instruction.InstructionDataModule`.

    Raises:
        FileNotFoundError: If ``path`` looks like a path and nothing is there.
        ValueError: If a file is not in GSM8K's format; names file and line.
        ConnectionError: If the data cannot be had from the hub.

    """

    def __init__(
        self,
        tokenizer: str,
        path: str = "openai/gsm8k",
        test_path: str | None = None,
        keep_annotations: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(tokenizer, **kwargs)
        self.path = path
        self.test_path = test_path
        self.keep_annotations = keep_annotations

    @override
    def load_examples(self, split: Split) -> list[Example] | None:
        """Return the checked examples of ``split``; GSM8K has no validation split."""
        if split == "val":
            return None
        examples = self._load(split)
        if examples is None or self.keep_annotations:
            return examples
        return [Example(example.question, strip_annotations(example.response)) for example in examples]

    def _load(self, split: Split) -> list[Example] | None:
        if split == "test" and self.test_path is not None:
            return read_jsonl(self._existing(Path(self.test_path)))
        path = Path(self.path).expanduser()
        if path.is_dir():
            return read_jsonl(self._existing(path / f"{split}.jsonl"))
        if path.exists():
            return read_jsonl(path) if split == "train" else None
        if path.suffix in (".jsonl", ".json") or path.is_absolute() or self.path.startswith((".", "~")):
            self._existing(path)
        return self._load_from_hub(split)

    @staticmethod
    def _existing(path: Path) -> Path:
        if not path.expanduser().is_file():
            raise FileNotFoundError(
                f"There is no file {str(path)!r}. Give --data.path a folder with train.jsonl and test.jsonl (columns"
                " question, answer), one such file, or a hub id such as openai/gsm8k."
            )
        return path.expanduser()

    def _load_from_hub(self, split: Split) -> list[Example]:
        import datasets

        try:
            rows = datasets.load_dataset(self.path, "main", split=split)
        except Exception as error:  # the hub, its cache and the network raise a dozen unrelated classes
            raise ConnectionError(
                f"Could not load {self.path!r} from the hub ({type(error).__name__}: {error}). Without a connection (or"
                " with HF_HUB_OFFLINE=1) pass local files: --data.path FOLDER, with train.jsonl and test.jsonl from"
                " grade_school_math/data of github.com/openai/grade-school-math."
            ) from error
        return list(_check_rows((f"{self.path} {split} row {number}", row) for number, row in enumerate(rows)))
