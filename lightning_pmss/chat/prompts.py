"""Read a file of prompts."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_pmss.datamodules.columns import BOOKKEEPING, filled
from lightning_pmss.messages import one_line, some
from lightning_pmss.store import json_value, refuse_unreadable

Turns = list[dict[str, str]]


@dataclass(frozen=True)
class Prompt:
    """One prompt of a file.

    Attributes:
        id: Its own id, or its number in the file, from 0.
        line: Its line, for messages.
        messages: Turns with `role` and `content`; the last one is the user's.
    """

    id: int | str
    line: int
    messages: Turns


def read_prompts(path: str) -> list[Prompt]:
    """Read the prompts of a .txt or .jsonl file; empty lines are skipped.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Another kind of file, no prompt in it, a line that is no prompt, or an id twice; the message names the line.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"--prompts {path}: there is no such file.")
    if file.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"--prompts {path}: give a .txt file with one prompt a line, or a .jsonl file.")
    refuse_unreadable(file)
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts {path} is no text in UTF-8 ({error.reason} at byte {error.start}).") from None
    found: list[Prompt] = []
    seen: dict[int | str, int] = {}
    for number, text in enumerate(lines, 1):
        text = text.removesuffix("\r")
        if not text.strip():
            continue
        where = f"{path} line {number}"
        row = {"prompt": text} if file.suffix == ".txt" else _row(text, where)
        name = row.get("id", len(found))
        if isinstance(name, bool) or not isinstance(name, int | str):
            raise ValueError(f"{where}: `id` is {one_line(repr(name)[:60])}; give a whole number or a text.")
        if name in seen:
            raise ValueError(
                f"{where} has the id {name!r} of line {seen[name]}; change one, or leave `id` out everywhere."
            )
        seen[name] = number
        found.append(Prompt(name, number, _messages(row, where)))
    if not found:
        raise ValueError(f"--prompts {path} contains no prompt.")
    return found


def _row(text: str, where: str) -> dict[str, Any]:
    try:
        row = json_value(text.encode())
    except ValueError as error:
        raise ValueError(f"{where} is not JSON ({error}).") from None
    if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
        raise ValueError(f'{where}: give an object with either "prompt" or "messages", such as {{"prompt": "Hello"}}.')
    _refuse_unread(row, {"prompt", "messages"} | BOOKKEEPING, where)
    return row


def _refuse_unread(given: Mapping[str, Any], read: Collection[str], where: str) -> None:
    """A system text or a limit that nothing reads would change no answer, and nobody would notice."""
    if unread := sorted(name for name, value in given.items() if name not in read and filled(value)):
        raise ValueError(
            f"{where}: {some(unread)} would not be read. A system text is the first turn of `messages`, limits are options of"
            " the command line; leave other columns out."
        )


def _messages(row: dict[str, Any], where: str) -> Turns:
    turns = row["messages"] if "messages" in row else [{"role": "user", "content": row["prompt"]}]
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{where}: `messages` is no list of turns.")
    for turn in turns:
        if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            raise ValueError(f"{where}: {one_line(repr(turn)[:60])} is no turn of two texts, role and content.")
        _refuse_unread(turn, ("role", "content"), where)
    if turns[-1]["role"] != "user" or not turns[-1]["content"].strip():
        raise ValueError(f"{where}: the last turn is to be the user's, with a text that is not empty.")
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]
