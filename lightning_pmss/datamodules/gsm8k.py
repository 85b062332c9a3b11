"""GSM8K, MetaMathQA and MATH, from the hub or from local files in the published formats.

GSM8K is of Cobbe et al. 2021, "Training Verifiers to Solve Math Word Problems"; MetaMathQA, of which PiSSA published a copy, of
Yu et al. 2023, "MetaMath"; MATH of Hendrycks et al. 2021, "Measuring Mathematical Problem Solving With the MATH Dataset".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_pmss.datamodules.columns import Format, recognise, text
from lightning_pmss.datamodules.instruction import Example, InstructionDataModule, Split, check_int
from lightning_pmss.datamodules.prompts import STYLES, PromptStyle
from lightning_pmss.datamodules.rows import (
    Row,
    existing,
    load_hub_rows,
    looks_like_file,
    read_rows,
    split_file,
)
from lightning_pmss.metrics import GSM8KAccuracy, MATHAccuracy, MetaMathAccuracy
from lightning_pmss.metrics.exact import exact_number
from lightning_pmss.metrics.metamath import MARK

_ANNOTATION = re.compile(r"<<[^<>\n]*>>")


def strip_annotations(answer: str) -> str:
    """Return ``answer`` without its calculator annotations, the ``<<48/2=24>>`` of GSM8K."""
    return _ANNOTATION.sub("", answer)


def _is_answer(gold: Callable[[str], Any]) -> Callable[[str], bool]:
    def check(response: str) -> bool:
        try:
            gold(response)
        except ValueError:
            return False
        return True

    return check


def _read_alike(answer: str) -> bool:
    """Return whether the published and the corrected rule find the same number; else the scores of neither are reliable."""
    text, number = GSM8KAccuracy.extract(answer), GSM8KAccuracy.extract_number(answer)
    return text is not None and number is not None and exact_number(text) == number


@dataclass(frozen=True)
class _Kind:
    """A published format, the first two columns being question and answer, and what an answer must hold.

    Args:
        format: Its columns.
        scored: Whether an answer of a test set can be scored.
        ends: Whether an answer to train on ends in a form that is read as the final answer.
        needs: The required end of the answer, for messages.
    """

    format: Format
    scored: Callable[[str], bool]
    ends: Callable[[str], bool]
    needs: str


_NUMBER = _is_answer(MetaMathAccuracy.gold)
_BOXED = _is_answer(MATHAccuracy.gold)
# Answers to MATH's questions need not be numbers; MetaMathAccuracy could not score them, but they can be trained on.
_METAMATH = (_NUMBER, lambda answer: MARK in answer, "a final 'The answer is: N'")
_GSM8K = _Kind(
    Format("GSM8K", ("question", "answer")),
    _read_alike,
    lambda answer: GSM8KAccuracy.extract(answer) is not None,
    "the final line '#### N' that GSM8K's answers are scored by",
)
_KINDS = {
    kind.format: kind
    for kind in (
        # MetaMath's backward questions, in two layouts, whose answers are bare numbers; the rest is what another model said.
        _Kind(
            Format(
                "GSM8K_Backward",
                ("question", "answer", "original_question"),
                silent=("original_answer", "output", "inv_question_pred_answer", "pred_inv_answer_cleaned"),
            ),
            _NUMBER,
            _NUMBER,
            "a number",
        ),
        _Kind(Format("MetaMathQA", ("query", "response"), silent=("type", "original_question")), *_METAMATH),
        # The answer of MATH-500 is what its solution has in the box.
        _Kind(
            Format("MATH", ("problem", "solution"), silent=("type", "level", "subject", "answer")),
            _BOXED,
            _BOXED,
            "a final answer in \\boxed{}",
        ),
        _Kind(Format("pissa-dataset", ("instruction", "output"), silent=("type",)), *_METAMATH),
        _GSM8K,
    )
}
_MATH_SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)
# Arguments of `load_dataset` beside the id, and the splits that exist.
_HUB: dict[str, tuple[list[dict[str, Any]], tuple[str, ...]]] = {
    "openai/gsm8k": ([{"name": "main"}], ("train", "test")),
    "EleutherAI/hendrycks_math": ([{"name": subject} for subject in _MATH_SUBJECTS], ("train", "test")),
    "HuggingFaceH4/MATH-500": ([{}], ("test",)),
    "meta-math/MetaMathQA": ([{}], ("train",)),
    "fxmeng/pissa-dataset": ([{"data_dir": "metamath"}], ("train", "test")),
}


def _parse(
    rows: Iterable[Row], split: Split, types: Sequence[str] = (), ignored: Sequence[str] = ()
) -> Iterator[tuple[Example, bool]]:
    """Yield each example of the wanted types, and whether its answer has an end."""
    kind: _Kind | None = None
    for where, row in rows:
        if kind is None:
            kind = _KINDS[recognise(list(_KINDS), row, ignored)]
            columns = kind.format.needs[:2]
            read = replace(kind.format, needs=(*kind.format.needs, "type")) if types else kind.format
            ends = kind.scored if split == "test" else kind.ends
        row = read.check(where, row, ignored)
        question, answer = (text(where, row, column).strip() for column in columns)
        if types and not str(row["type"]).startswith(tuple(types)):
            continue
        whole = ends(answer)
        if not whole and (split == "test" or kind is _GSM8K):
            raise ValueError(f"{where}: the answer ends in {answer[-40:]!r}, without {kind.needs}. Add it.")
        named = row.get("type") or row.get("subject")
        yield Example(question, answer, kind=named if isinstance(named, str) else None), whole


def _read(
    path: Path, split: Split, types: Sequence[str] = (), ignored: Sequence[str] = ()
) -> list[tuple[Example, bool]]:
    found = list(_parse(read_rows(path), split, types, ignored))
    if not found:
        of_type = f" of type {' or '.join(types)}" if types else ""
        raise ValueError(f"{path}: no examples{of_type} in this file; it needs one JSON object per line.")
    return found


def read_jsonl(path: str | Path, ignore_columns: Sequence[str] = ()) -> list[Example]:
    """Read and check a file in the format of GSM8K, MetaMathQA or MATH. Empty lines are skipped.

    Args:
        path: The file: JSONL, JSON or parquet, by its name.
        ignore_columns: Columns that may be filled though they are not read.

    Returns:
        Its examples, in order.

    Raises:
        ValueError: If a line is not UTF-8, not a JSON object, lacks a column, has another one filled, or has an empty
            question or answer or one that cannot be scored; the message names the file and the line. Also if the file
            has no examples.
    """
    return [example for example, _ in _read(Path(path), "test", (), ignore_columns)]


class GSM8KDataModule(InstructionDataModule):
    """GSM8K, MetaMathQA or MATH, from the hub or from local files; the columns of the first row decide which.

    =========================  ======================  ==========================================================
    data                       columns                 hub ids
    =========================  ======================  ==========================================================
    GSM8K                      question, answer        openai/gsm8k (train 7,473 rows, test 1,319)
    MetaMathQA                 query, response, type   meta-math/MetaMathQA (train only)
    MetaMathQA of PiSSA        instruction, output     fxmeng/pissa-dataset
    MATH                       problem, solution       EleutherAI/hendrycks_math, HuggingFaceH4/MATH-500 (test only)
    =========================  ======================  ==========================================================

    Validation is held out from the training rows by ``seed``. To train on MetaMathQA and test on GSM8K give both paths;
    a model that learnt to end in "The answer is: " is scored by ``MetaMathAccuracy``.

    Args:
        tokenizer: Folder or hub id of the model's tokenizer.
        path: Hub id, or a folder with ``train.jsonl`` and ``test.jsonl`` (or ``.json``, ``.parquet``), or one file to
            train on.
        test_path: Hub id, folder or file to test on. Null: the test split of ``path``, which a single file and
            MetaMathQA do not have.
        keep_annotations: Keep the calculator annotations ``<<48/2=24>>`` in the answers. On by default: the published
            text, as in other results, and a scratch pad for the model. Off: about a quarter fewer
            tokens per answer.
        types: Train on rows whose ``type`` starts with one of these only; MetaMathQA's are ``GSM_...`` and
            ``MATH_...``. Null: all.
        first_rows: Train (and validate) on the first N rows that are left, the convention of PiSSA and others
            (100,000). Null: all. (``train_limit`` draws by seed instead, from what is left here.)
        **kwargs: Arguments of `InstructionDataModule`; here
            ``prompt_style`` may also be "lm_eval" (the same text as "plain"), "cot" ("Q: ...", newline, "A:") and
            "minerva" ("Problem:", "Solution:"), the forms of the usual 5 (GSM8K, from train), 8 and 4 (MATH) worked
            examples; the fixed ones of the last two go into the file ``shots``.

    Raises:
        FileNotFoundError: If ``path`` looks like a path and nothing is there.
        ValueError: If a file is not in one of the formats; names file and line.
        ConnectionError: If the data cannot be had from the hub.
    """

    styles: ClassVar[dict[str, PromptStyle]] = {
        **STYLES,
        "lm_eval": PromptStyle(InstructionDataModule.plain_template),
        # Chain-of-thought prompting (Wei et al. 2022), and MATH as asked by Minerva (Lewkowycz et al. 2022).
        "cot": PromptStyle("Q: {question}\nA:"),
        "minerva": PromptStyle("Problem:\n{question}\n\nSolution:", lead="\n"),
    }

    def __init__(
        self,
        tokenizer: str,
        path: str = "openai/gsm8k",
        test_path: str | None = None,
        keep_annotations: bool = True,
        types: str | Sequence[str] | None = None,
        first_rows: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(tokenizer, **kwargs)
        check_int(type(self).__name__, "first_rows", first_rows, 1, optional=True)
        self.path = path
        self.test_path = test_path
        self.keep_annotations = keep_annotations
        self.types = [types] if isinstance(types, str) else list(types or ())
        self.first_rows = first_rows

    @override
    def load_examples(self, split: Split) -> list[Example] | None:
        """Return the checked examples of ``split``; none of the data sets has a validation split."""
        if split == "val":
            return None
        found = self._load(split)
        if found is None:
            return None
        if split == "train":
            found = found[: self.first_rows]
            without = sum(not scored for _, scored in found)
            if without:
                rank_zero_warn(f"{without} of {len(found)} training answers of {self.path} end without a final answer.")
        examples = [example for example, _ in found]
        if self.keep_annotations:
            return examples
        return [example._replace(response=strip_annotations(example.response)) for example in examples]

    def _load(self, split: Split) -> list[tuple[Example, bool]] | None:
        given = self.path if split == "train" or self.test_path is None else self.test_path
        option = "test_path" if split == "test" and self.test_path is not None else "path"
        types = self.types if split == "train" else ()
        remedy = (
            f"Give --data.{option} a folder with train.jsonl and test.jsonl (columns question, answer), one such file,"
            " or a hub id such as openai/gsm8k."
        )
        if looks_like_file(given):
            path = Path(given).expanduser()
            if path.is_dir():
                return _read(split_file(path, [split], remedy), split, types, self.ignore_columns)
            if split == "test" and self.test_path is None and path.is_file():
                return None
            return _read(existing(path, remedy), split, types, self.ignore_columns)
        options, splits = _HUB.get(given, ([{}], ("train", "test")))
        if split not in splits:
            return None
        files = (
            f"--data.{option} FOLDER, with train.jsonl and test.jsonl (GSM8K's are in grade_school_math/data of"
            " github.com/openai/grade-school-math)."
        )
        return list(_parse(load_hub_rows(given, split, options, files), split, types, self.ignore_columns))
