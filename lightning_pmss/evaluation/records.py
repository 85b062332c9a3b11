"""Predictions files: JSON lines, one object per example."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from lightning_pmss.messages import one_line
from lightning_pmss.store import Record, checked, json_value, refuse_unreadable
from lightning_pmss.store.disk import atomic_file

NEEDED = ("id", "prompt", "output")
_REMEDY = "Remove that line and run `test` again: it keeps the other lines."


class PredictionRecord(Record):
    """Required fields of a line of a predictions file; fields that a metric adds are checked by name.

    Attributes:
        id: Id of the question; `test` writes the row's number in its source.
        prompt: The question.
        output: The answer.
        group: The task, if there are several.
        run: Hash of the evaluation.
    """

    # Losses and log-likelihoods of a diverged model may be NaN, unlike scores.
    model_config = ConfigDict(extra="allow", allow_inf_nan=True)

    id: int | str
    prompt: str
    output: str
    group: str | None = None
    run: str | None = None


class AnswerRecord(PredictionRecord):
    """Required fields of a line for resuming an evaluation.

    Attributes:
        target: Gold target of the question.
        prompt_tokens: Number of tokens of the prompt.
        loss: Mean cross entropy of the gold response.
        tokens: Number of tokens of the gold response.
    """

    id: int
    run: str
    target: Any
    prompt_tokens: int
    loss: float
    tokens: Annotated[int, Field(ge=0)]


def read_records(
    path: str | os.PathLike[str], *, unfinished: bool = False, kind: type[PredictionRecord] = PredictionRecord
) -> list[dict[str, Any]]:
    """Read a predictions file.

    Args:
        path: The file.
        unfinished: Whether writing may have been killed; a last line without newline is then ignored.
        kind: Required fields of each line.

    Raises:
        FileNotFoundError: The file does not exist.
        PermissionError: The file must not be read.
        ValueError: Not a predictions file; the message names the line.
    """
    file = Path(path).expanduser()
    if not file.exists():
        raise FileNotFoundError(
            f"There is no file {str(path)!r}. `test` writes predictions-test.jsonl into its log folder, or into "
            "--model.predictions_dir."
        )
    refuse_unreadable(file)
    lines = file.read_bytes().split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    elif unfinished:
        lines.pop()  # cut off, because each line is written together with its newline
    rows: list[dict[str, Any]] = []
    seen: dict[Any, int] = {}
    for number, line in enumerate(lines, 1):
        row = _row(line, f"{path} line {number}", kind)
        if row["id"] in seen:
            raise ValueError(f"{path} line {number} has the id {row['id']!r} of line {seen[row['id']]}; remove one.")
        seen[row["id"]] = number
        rows.append(row)
    return rows


def _row(line: bytes, where: str, kind: type[PredictionRecord]) -> dict[str, Any]:
    try:
        row = json_value(line, finite=False)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON ({error}). {_REMEDY}") from None
    if not isinstance(row, dict) or (missing := [key for key in NEEDED if key not in row]):
        lacks = f"lacks {', '.join(missing)}" if isinstance(row, dict) else "is no object"
        raise ValueError(
            f"{where} {lacks}; give a predictions file as `test` writes it, with {', '.join(NEEDED)} in each line."
        )
    checked(kind, row, where, _REMEDY)
    for key in filter(is_score, row):
        if row[key] is not None and not _is_number(row[key]):
            raise ValueError(f"{where}: `{one_line(key)}` is no finite number, but {_short(row[key])}. {_REMEDY}")
    return row


def is_score(key: str) -> bool:
    """Whether a line has a score under this key: ``score``, and keys that begin with ``score_``."""
    return key == "score" or key.startswith("score_")


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and math.isfinite(float(value))
    except OverflowError:
        return False


def _short(value: Any) -> str:
    return type(value).__name__ if isinstance(value, dict | list) else one_line(repr(value)[:60])


def to_line(row: Mapping[str, Any]) -> str:
    """Return a row as one line of JSON with a newline."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def append_records(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Append rows to a file in one write and flush it to the disk: after a kill, only the last line may be cut off."""
    data = "".join(map(to_line, rows)).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab", opener=_not_through_links) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _not_through_links(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def write_records(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Write one JSON object per line; an earlier file is replaced only by a complete new one."""
    _replace(path, "".join(map(to_line, rows)))


def write_json(value: Any, path: Path) -> None:
    """Write one JSON document; an earlier file is replaced only by a complete new one."""
    _replace(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def _replace(path: Path, text: str) -> None:
    with atomic_file(path) as new:
        new.write_bytes(text.encode())
