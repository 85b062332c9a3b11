"""The commonsense tasks as their authors publish them on the hub, put into LLM-Adapters' form.

LLM-Adapters' files have other line breaks per task (kept here) and no passage for BoolQ. The hub's columns are those of
the data sets' cards; a missing one is an error that names it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_pmss.datamodules.columns import Format
from lightning_pmss.datamodules.rows import Row, load_hub_rows

_Made = tuple[str, str]  # instruction, label


def _numbered(word: str, choices: list[str], joint: str = " ") -> str:
    return joint.join(f"{word}{number}: {choice}" for number, choice in enumerate(choices, start=1))


def _format(word: str, count: int) -> str:
    return "Answer format: " + "/".join(f"{word}{number}" for number in range(1, count + 1))


def _answer_task(question: str, choices: list[str], place: int) -> _Made:
    asked = f"Please choose the correct answer to the question: {question}\n\n{_numbered('Answer', choices)}"
    return f"{asked}\n\n{_format('answer', len(choices))}", f"answer{place + 1}"


def _boolq(row: Mapping[str, Any]) -> _Made:
    question = str(row["question"]).rstrip("?")
    asked = f"Please answer the following question with true or false, question: {question}?"
    return f"{asked}\n\nAnswer format: true/false", "true" if row["answer"] else "false"


def _piqa(row: Mapping[str, Any]) -> _Made:
    choices = _numbered("Solution", [row["sol1"], row["sol2"]], "\n\n")
    asked = f"Please choose the correct solution to the question: {row['goal']}\n\n{choices}"
    return f"{asked}\n\n{_format('solution', 2)}", f"solution{int(row['label']) + 1}"


def _siqa(row: Mapping[str, Any]) -> _Made:
    choices = [row[f"answer{letter}"] for letter in "ABC"]
    return _answer_task(f"{row['context']} {row['question']}", choices, int(row["label"]) - 1)


def _hellaswag(row: Mapping[str, Any]) -> _Made:
    sentence = f"{row['activity_label']}: {row['ctx']}"
    asked = f"Please choose the correct ending to complete the given sentence: {sentence}"
    choices = _numbered("Ending", list(row["endings"]))
    return f"{asked}\n\n{choices}\n\n{_format('ending', len(row['endings']))}", f"ending{int(row['label']) + 1}"


def _winogrande(row: Mapping[str, Any]) -> _Made:
    asked = (
        "Please choose the correct answer to fill in the blank to complete the given sentence: "
        f"{row['sentence']}\n\n{_numbered('Option', [row['option1'], row['option2']])}"
    )
    return f"{asked} {_format('option', 2)}", f"option{row['answer']}"


def _choices(row: Mapping[str, Any], question: str) -> _Made:
    return _answer_task(row[question], row["choices"]["text"], list(row["choices"]["label"]).index(row["answerKey"]))


@dataclass(frozen=True)
class _Source:
    hub_id: str
    split: str
    columns: tuple[str, ...]
    make: Callable[[Mapping[str, Any]], _Made]
    config: str | None = None
    silent: tuple[str, ...] = ()
    """Columns that LLM-Adapters' form leaves out: BoolQ's passage (it is asked closed book), identities, parts of others."""

    @property
    def format(self) -> Format:
        return Format(self.hub_id, self.columns, silent=self.silent)


_ARC = ("question", "choices", "answerKey")
_SOURCES = {
    "boolq": _Source("google/boolq", "validation", ("question", "answer"), _boolq, silent=("passage",)),
    "piqa": _Source("ybisk/piqa", "validation", ("goal", "sol1", "sol2", "label"), _piqa),
    "social_i_qa": _Source(
        "allenai/social_i_qa", "validation", ("context", "question", "answerA", "answerB", "answerC", "label"), _siqa
    ),
    "hellaswag": _Source(
        "Rowan/hellaswag",
        "validation",
        ("activity_label", "ctx", "endings", "label"),
        _hellaswag,
        silent=("ind", "ctx_a", "ctx_b", "source_id", "split_type"),
    ),
    "winogrande": _Source(
        "allenai/winogrande",
        "validation",
        ("sentence", "option1", "option2", "answer"),
        _winogrande,
        "winogrande_xl",
        ("qID",),
    ),
    "ARC-Easy": _Source("allenai/ai2_arc", "test", _ARC, lambda row: _choices(row, "question"), "ARC-Easy"),
    "ARC-Challenge": _Source("allenai/ai2_arc", "test", _ARC, lambda row: _choices(row, "question"), "ARC-Challenge"),
    "openbookqa": _Source(
        "allenai/openbookqa",
        "test",
        ("question_stem", "choices", "answerKey"),
        lambda row: _choices(row, "question_stem"),
        "main",
        ("fact1", "humanScore", "clarity", "turkIdAnonymized"),
    ),
}


def to_llm_adapters(task: str, where: str, row: Any, ignored: Sequence[str] = ()) -> dict[str, str]:
    """Return a row of the original data of ``task`` in LLM-Adapters' form.

    Raises:
        ValueError: If it lacks a column or has another one filled that is not ``ignored``, or its answer is none of its
            choices; the message says where.
    """
    source = _SOURCES[task]
    row = source.format.check(where, row, ignored)
    try:
        instruction, label = source.make(row)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{where}: not a row of {source.hub_id} ({error}).") from error
    return {"instruction": instruction, "input": "", "output": f"the correct answer is {label}", "answer": label}


def hub_rows(task: str, ignored: Sequence[str] = ()) -> list[Row]:
    """Return the evaluation rows of ``task`` from the hub in LLM-Adapters' form.

    Raises:
        ConnectionError: If they cannot be downloaded.
    """
    source = _SOURCES[task]
    options = [{"name": source.config} if source.config else {}]
    files = "--data.test_path FOLDER, with <task>/test.json (dataset/ of github.com/AGI-Edgerunners/LLM-Adapters)."
    rows = load_hub_rows(source.hub_id, source.split, options, files)
    return [(where, to_llm_adapters(task, where, row, ignored)) for where, row in rows]
