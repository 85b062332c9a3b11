r"""DROP, questions on passages whose answers are numbers, dates and spans.

Dua et al. 2019, "DROP: A Reading Comprehension Benchmark Requiring Discrete Reasoning Over Paragraphs". The data comes from the
hub or from local files in four published formats:

* the original ``drop_dataset_*.json``: passages with ``qa_pairs``, each with ``answer`` and ``validated_answers``,
* rows of ``EleutherAI/drop``: the same per question, flat,
* rows of ``ucinlp/drop``: ``answers_spans`` with a flat list of spans. The list no longer separates answers of several
  spans from answers of several annotators: each span is read as an answer of its own, as QuanTA and others do. Use the
  format above for official scores,
* rows with ``context`` ("Passage: ...\nQuestion: ...\nAnswer:"), ``completion`` and ``ref_text``, whose answers are
  separated by ``|`` (OpenAI simple-evals); several spans of an answer are one text there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from typing_extensions import override

from lightning_pmss.datamodules.columns import Format, recognise, text
from lightning_pmss.datamodules.instruction import Example, InstructionDataModule, Split
from lightning_pmss.datamodules.prompts import PromptStyle
from lightning_pmss.datamodules.rows import (
    Row,
    existing,
    load_hub_rows,
    looks_like_file,
    read_json,
    read_rows,
    split_file,
)
from lightning_pmss.metrics.drop import answer_strings

_STEMS = {"train": ("train", "drop_dataset_train"), "test": ("test", "dev", "validation", "drop_dataset_dev")}
_PASSAGE, _QUESTION, _ANSWER = "Passage: ", "\nQuestion: ", "\nAnswer:"

_IDS = ("query_id", "section_id", "passage_id")
_ENTRY = Format("DROP", ("passage", "qa_pairs"), silent=("wiki_url", *_IDS))
_PAIR = Format("DROP", ("question", "answer"), reads=("validated_answers",), silent=_IDS)
_ASKED = Format("DROP", ("passage", "question"), reads=("answer", "answers_spans", "validated_answers"), silent=_IDS)
_ROW = Format("DROP", ("passage", "question", "answer"), reads=("validated_answers",), silent=_IDS)
_SPANS = Format("ucinlp/drop", ("passage", "question", "answers_spans"), silent=_IDS)
_CONTEXT = Format("simple-evals' DROP", ("context", "completion", "ref_text"))
# The columns that are objects.
_GOLD = Format("an answer of DROP", (), reads=("number", "spans", "date"), silent=("worker_id", "hit_id"))
_ANSWERS_SPANS = Format("answers_spans", ("spans",), silent=("types",))


class DROPQuestion(NamedTuple):
    """A question and its gold answers, the first one first; each is a list of spans."""

    passage: str
    question: str
    answers: list[list[str]]
    kind: str | None = None
    """The type of the first answer: number, span, spans or date; null where the format does not say it."""


def _answers(where: str, row: Mapping[str, Any], ignored: Sequence[str]) -> tuple[list[list[str]], str]:
    """Return the gold answers, and the type of the first one."""
    answers, kinds = [], []
    validated = [("validated_answers", answer) for answer in _records(where, row.get("validated_answers"))]
    for column, candidate in [("answer", row["answer"]), *validated]:
        if not isinstance(candidate, Mapping):
            raise ValueError(f"{where}: an answer is {candidate!r}; it must be an object with number, spans and date.")
        _GOLD.check(where, candidate, ignored, f"{column}.")
        try:
            found, kind = answer_strings(candidate)
        except ValueError as error:
            raise ValueError(f"{where}: {error}.") from None
        spans = list(found)
        if spans[0].strip() and spans not in answers:
            answers.append(spans)
            kinds.append(kind)
    if not answers:
        raise ValueError(f"{where}: no gold answer that is not blank; remove the question or give it an answer.")
    return answers, kinds[0]


def _records(where: str, validated: Any) -> list[Any]:
    """Return validated answers as a list of objects; `datasets` turns such a list into an object of lists."""
    if not isinstance(validated, Mapping):
        return list(validated or ())
    columns = list(validated.values())
    if not all(isinstance(column, list) for column in columns) or len(set(map(len, columns))) > 1:
        raise ValueError(
            f"{where}: the validated_answers are {validated!r}; give objects, or one of lists of equal length."
        )
    return [dict(zip(validated, values, strict=True)) for values in zip(*columns, strict=True)]


def _from_passages(path: Path, passages: Mapping[str, Any], ignored: Sequence[str]) -> Iterator[DROPQuestion]:
    for name, entry in passages.items():
        where = f"{path} passage {name!r}"
        entry = _ENTRY.check(where, entry, ignored)
        passage = text(where, entry, "passage")
        if not isinstance(entry["qa_pairs"], list):
            raise ValueError(f"{where}: qa_pairs is {type(entry['qa_pairs']).__name__}; it must be a list.")
        for number, pair in enumerate(entry["qa_pairs"]):
            place = f"{where} question {number}"
            pair = _PAIR.check(place, pair, ignored, "qa_pairs.")
            yield DROPQuestion(passage, text(place, pair, "question").strip(), *_answers(place, pair, ignored))


def _from_context(where: str, row: Mapping[str, Any]) -> DROPQuestion:
    context = text(where, row, "context")
    start = context.rfind(_QUESTION)
    if not context.startswith(_PASSAGE) or start < 0 or not context.endswith(_ANSWER):
        raise ValueError(
            f"{where}: the context {context[:40]!r}... is not of the form 'Passage: ...\\nQuestion: ...\\nAnswer:'."
        )
    answers = [[answer] for answer in text(where, row, "ref_text").split("|") if answer.strip()]
    if not answers:
        raise ValueError(f"{where}: the ref_text {row['ref_text']!r} holds no answer.")
    first = [text(where, row, "completion").strip()]
    # The completion is one of the answers. It goes first, because the first answer is trained on.
    answers.sort(key=lambda answer: answer[0].strip() != first[0])
    question = context[start + len(_QUESTION) : -len(_ANSWER)]
    return DROPQuestion(context[len(_PASSAGE) : start], question, answers)


def _spans(where: str, value: Any, ignored: Sequence[str]) -> list[list[str]]:
    spans = _ANSWERS_SPANS.check(where, value, ignored, "answers_spans.")["spans"]
    if not isinstance(spans, list) or not all(isinstance(span, str) for span in spans):
        raise ValueError(f"{where}: the spans are {spans!r}; they must be a list of texts.")
    answers = [[span] for span in dict.fromkeys(spans) if span.strip()]
    if not answers:
        raise ValueError(f"{where}: no gold answer that is not blank; remove the question or give it an answer.")
    return answers


def _from_rows(rows: Iterable[Row], ignored: Sequence[str] = ()) -> Iterator[DROPQuestion]:
    for where, row in rows:
        kind = recognise((_CONTEXT, _SPANS, _ROW), row, ignored)
        if kind is not _CONTEXT:
            _ASKED.check(where, row, ignored)
        row = kind.check(where, row, ignored)
        if kind is _CONTEXT:
            yield _from_context(where, row)
            continue
        passage, question = text(where, row, "passage"), text(where, row, "question").strip()
        if kind is _ROW:
            yield DROPQuestion(passage, question, *_answers(where, row, ignored))
        else:
            yield DROPQuestion(passage, question, _spans(where, row["answers_spans"], ignored))


def read_drop(path: str | Path, ignore_columns: Sequence[str] = ()) -> list[DROPQuestion]:
    """Read and check a file in one of DROP's formats, see the module.

    Args:
        path: The file.
        ignore_columns: Columns that may be filled though they are not read.

    Raises:
        ValueError: If it is in none, or a question has no answer; the message names file and row.
    """
    path = Path(path)
    whole = read_json(path) if path.suffix == ".json" else None
    if isinstance(whole, Mapping):
        questions = list(_from_passages(path, whole, ignore_columns))
    else:
        questions = list(_from_rows(read_rows(path), ignore_columns))
    if not questions:
        raise ValueError(f"{path}: no questions in this file.")
    return questions


class DROPDataModule(InstructionDataModule):
    r"""DROP, from the hub or from local files.

    The response is the first gold answer, its spans joined by ``separator``; the target of an example (in
    ``batch["target"]``) is the list of all its gold answers, each a list of spans, as `DROPScore` takes it. Give
    that metric the same ``separator``.

    Prompt styles besides those of the base (all but the last with the text in which QuanTA and simple-evals ask):

    * "plain", the default: ``Passage: {passage}\nQuestion: {question}\nAnswer:``,
    * "quanta": the same prompt byte for byte; the response is the first *span* alone and ends in a newline, as in
      ``quanta-fine-tuning/quanta``, ``run/utils/templates.py``,
    * "lm_eval": ``{passage} {question}``.

    The ``num_shots`` worked examples come from training passages, each from another one, and none of them is evaluated.

    The dev set is the test set here (the hidden test set of the leaderboard is not public), and validation is held out
    from the training rows by ``seed``: whole passages with all their questions, ``val_size`` questions or up to one
    passage more, so that no validation passage occurs in training.

    Args:
        tokenizer: Folder or hub id of the model's tokenizer.
        path: Hub id, or a folder with ``drop_dataset_train.json`` and ``drop_dataset_dev.json`` (or ``train`` and
            ``test``, ``dev`` or ``validation``, each as ``.jsonl``, ``.json`` or ``.parquet``), or one file to train on.
        test_path: Hub id, folder or file to test on. Null: the dev set of ``path``, which a single file does not have.
        separator: Joins the spans of an answer.
        max_length: As in the base; DROP's passages are long (most examples take 200 to 500 tokens).
        **kwargs: Arguments of `InstructionDataModule`.

    Raises:
        FileNotFoundError: If a path looks like a path and nothing is there.
        ValueError: If a file is in none of the formats; names file and row.
        ConnectionError: If the data cannot be had from the hub.
    """

    plain_template: ClassVar[str] = "{question}\nAnswer:"
    styles: ClassVar[dict[str, PromptStyle]] = {
        "quanta": PromptStyle("{question}\nAnswer:", tail="\n"),
        "lm_eval": PromptStyle("{question}"),
    }

    def __init__(
        self,
        tokenizer: str,
        path: str = "EleutherAI/drop",
        test_path: str | None = None,
        separator: str = "; ",
        max_length: int = 1024,
        **kwargs: Any,
    ) -> None:
        super().__init__(tokenizer, max_length=max_length, **kwargs)
        if not separator.strip():
            raise ValueError(f"`DROPDataModule(separator={separator!r})`: give a text that is not blank, such as '; '.")
        self.path = path
        self.test_path = test_path
        self.separator = separator

    @override
    def load_examples(self, split: Split) -> list[Example] | None:
        """Return the checked examples of ``split``; there is no validation split."""
        questions = self._load(split)
        return None if questions is None else [self._example(question) for question in questions]

    def _example(self, question: DROPQuestion) -> Example:
        if self.prompt_style == "lm_eval":
            asked = f"{question.passage} {question.question}"
        else:
            asked = f"{_PASSAGE}{question.passage}{_QUESTION}{question.question}"
        first = question.answers[0]
        response = first[0] if self.prompt_style == "quanta" else self.separator.join(span.strip() for span in first)
        return Example(asked, response.strip(), question.answers, question.passage, question.kind)

    def _load(self, split: Split) -> list[DROPQuestion] | None:
        if split == "val":
            return None
        given = self.path if split == "train" or self.test_path is None else self.test_path
        option = "test_path" if split == "test" and self.test_path is not None else "path"
        remedy = (
            f"Give --data.{option} a folder with drop_dataset_train.json and drop_dataset_dev.json, one such file, or a"
            " hub id such as EleutherAI/drop."
        )
        if looks_like_file(given):
            path = Path(given).expanduser()
            if path.is_dir():
                return read_drop(split_file(path, _STEMS[split], remedy), self.ignore_columns)
            if split == "test" and self.test_path is None and path.is_file():
                return None
            return read_drop(existing(path, remedy), self.ignore_columns)
        files = f"--data.{option} FOLDER, with drop_dataset_train.json and drop_dataset_dev.json of the DROP release."
        hub_split = "train" if split == "train" else "validation"
        return list(_from_rows(load_hub_rows(given, hub_split, [{}], files), self.ignore_columns))
