"""Recognise the layout of a file of conversations by its columns, and read its rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_pmss.datamodules.columns import Format, filled, recognise
from lightning_pmss.datamodules.conversations.messages import (
    OR_SKIP,
    BadRowError,
    Message,
    check_order,
    read_json,
    read_messages,
    short,
)

Side = dict[str, Any]
"""One text to train on: ``messages`` and ``tools``, or ``prompt`` and ``text`` that are joined as they are."""


@dataclass(frozen=True)
class Layout:
    """How rows are read, whatever the file.

    Args:
        columns: Our names of columns -> those of the file.
        roles: Further names of roles -> system, user, assistant or tool.
        ignored: Columns that may be filled though nothing reads them.
        plain: Join prompt and completion as they are, without a chat template.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)
    ignored: Sequence[str] = ()
    plain: bool = False

    def recognise(self, where: str, row: Any) -> Kind:
        """Return the kind of a file by its first row.

        Raises:
            BadRowError: If a mapped column is missing, or the columns are those of no layout; the message has the columns
                that are there.
        """
        if not isinstance(row, Mapping):
            lists = " A file with one list of all rows is to be named .json." if isinstance(row, list) else ""
            raise BadRowError(
                f"{where}: expected a JSON object with the columns of a layout, got {type(row).__name__}.{lists} {_LAYOUTS}"
            )
        for ours, theirs in self.columns.items():
            if theirs not in row:
                found = ", ".join(sorted(map(str, row)))
                raise BadRowError(
                    f"{where}: no column {theirs!r}, which --data.columns gives for {ours!r}; found {found}."
                )
        if not any(name in self._renamed(row) for each in KINDS for name in each.needs):
            raise BadRowError(_unknown(where, row))
        return KINDS[recognise(list(KINDS), self._renamed(row), self.ignored)]

    def read(self, where: str, row: Any, kind: Kind) -> list[Side]:
        """Return the texts of one row: one, or two of a row of preferences, the chosen one first.

        Raises:
            BadRowError: If there is anything wrong with it; the message has the place and what to do.
        """
        row = self._renamed(row)
        if isinstance(row, Mapping) and not all(name in row for name in kind.format.needs):
            other = next(
                (each for each in KINDS.values() if each is not kind and each.format.fits(row, self.ignored)), None
            )
            if other is not None:
                raise BadRowError(
                    f"{where}: this is a row of {other.format.name}, and the first row of the file is one of"
                    f" {kind.format.name}. Put rows of one kind into a file."
                )
        try:
            row = kind.format.check(where, row, self.ignored)
        except ValueError as error:
            raise BadRowError(str(error)) from error
        return kind.read(self, where, row)

    def _renamed(self, row: Any) -> Any:
        if not isinstance(row, Mapping) or not self.columns:
            return row
        mapped = {ours: row[theirs] for ours, theirs in self.columns.items() if theirs in row}
        taken = set(self.columns.values())
        return {**{name: value for name, value in row.items() if name not in taken and name not in mapped}, **mapped}

    def messages(self, where: str, row: Mapping[str, Any], column: str) -> list[Message]:
        """Return the messages in a column."""
        return read_messages(where, row[column], column, self.roles, self.ignored)


def _unknown(where: str, row: Mapping[str, Any]) -> str:
    """Return what is wrong with columns that belong to no layout, and how to map them."""
    spelt = {str(name).strip().casefold(): str(name) for name in row}
    known = (name for each in KINDS for name in each.needs if name in spelt)
    ours = next(known, "messages")
    theirs = spelt.get(ours, next(iter(spelt.values()), "COLUMN"))
    return (
        f"{where}: the columns {', '.join(sorted(map(str, row)))} are those of no layout. {_LAYOUTS} Map yours, ours first,"
        f" for example --data.columns '{{{ours}: {theirs}}}'."
    )


@dataclass(frozen=True)
class Kind:
    """A layout that is recognised by its columns.

    Args:
        format: Its columns.
        read: Makes texts of a row.
    """

    format: Format
    read: Callable[[Layout, str, Mapping[str, Any]], list[Side]]


def _text(where: str, row: Mapping[str, Any], column: str) -> str:
    value = row[column]
    if not isinstance(value, str) or not value.strip():
        raise BadRowError(f"{where}: the {column} is {short(value)}; it must be a text that is not empty.{OR_SKIP}")
    return value


def _optional(where: str, row: Mapping[str, Any], column: str) -> str:
    return _text(where, row, column) if filled(row.get(column)) else ""


def _side(where: str, row: Mapping[str, Any], messages: list[Message]) -> Side:
    """Return checked messages, with the system's text and the tools that a row has beside them."""
    if system := _optional(where, row, "system"):
        if messages and messages[0]["role"] in ("system", "developer"):
            raise BadRowError(f"{where}: both the column 'system' and the first message are system turns; keep one.")
        messages = [{"role": "system", "content": system}, *messages]
    check_order(where, messages)
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        tools = read_json(where, tools, "'tools'")
    if filled(tools) and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise BadRowError(f"{where}: 'tools' is {short(tools)}; it must be a list of objects, one for each function.")
    return {"messages": messages, "tools": tools if filled(tools) else None}


def _pair(asked: str, said: str) -> list[Message]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]


def _read_messages(layout: Layout, where: str, row: Mapping[str, Any]) -> list[Side]:
    return [_side(where, row, layout.messages(where, row, "messages"))]


def _read_sharegpt(layout: Layout, where: str, row: Mapping[str, Any]) -> list[Side]:
    return [_side(where, row, layout.messages(where, row, "conversations"))]


def _read_alpaca(layout: Layout, where: str, row: Mapping[str, Any]) -> list[Side]:
    messages: list[Message] = []
    history = row.get("history") if filled(row.get("history")) else []
    if not isinstance(history, list) or not all(isinstance(each, (list, tuple)) and len(each) == 2 for each in history):
        raise BadRowError(f"{where}: 'history' is {short(history)}; it must be a list of pairs, question and answer.")
    for asked, said in history:
        turn = {"question": asked, "answer": said}
        messages += _pair(
            _text(f"{where}: in 'history'", turn, "question"), _text(f"{where}: in 'history'", turn, "answer")
        )
    instruction, more, output = (read(where, row, name) for read, name in (
        (_text, "instruction"), (_optional, "input"), (_text, "output")
    ))  # fmt: skip
    asked, answer = _pair(f"{instruction}\n{more}" if more else instruction, output)
    if more:  # the template "alpaca" puts the two apart
        asked |= {"instruction": instruction, "input": more}
    return [_side(where, row, [*messages, asked, answer])]


def _read_completion(layout: Layout, where: str, row: Mapping[str, Any]) -> list[Side]:
    if isinstance(row["prompt"], list) or isinstance(row["completion"], list):
        return [_side(where, row, _joined(layout, where, row, "prompt", "completion"))]
    prompt, completion = _text(where, row, "prompt"), _text(where, row, "completion")
    if layout.plain:
        return [{"prompt": prompt, "text": completion}]
    return [_side(where, row, _pair(prompt, completion))]


def _joined(layout: Layout, where: str, row: Mapping[str, Any], asked: str, answered: str) -> list[Message]:
    """Return the messages of two columns, each a text or a list of messages."""
    parts = []
    for column, role in ((asked, "user"), (answered, "assistant")):
        if isinstance(row[column], list):
            parts += layout.messages(where, row, column)
        else:
            parts.append({"role": role, "content": _text(where, row, column)})
    return parts


def _read_preferences(layout: Layout, where: str, row: Mapping[str, Any]) -> list[Side]:
    answers = ("chosen", "rejected")
    if layout.plain:
        sides: list[Side] = [
            {"prompt": _text(where, row, "prompt"), "text": _text(where, row, name)} for name in answers
        ]
    else:
        sides = [_side(where, row, _answered(layout, where, row, name)) for name in answers]
        first, second = ([*side["messages"][:-1]] for side in sides)
        if first != second:
            raise BadRowError(
                f"{where}: 'chosen' and 'rejected' differ before their last turn; they must answer the same."
            )
    if sides[0] == sides[1]:
        raise BadRowError(f"{where}: 'chosen' and 'rejected' are the same, so there is nothing to prefer.")
    return sides


def _answered(layout: Layout, where: str, row: Mapping[str, Any], column: str) -> list[Message]:
    """Return the conversation that ends in a chosen or rejected answer; that column may contain all of it."""
    if isinstance(row[column], list):
        messages = layout.messages(where, row, column)
        if messages[0]["role"] != "assistant":
            return messages
    if not filled(row.get("prompt")):
        raise BadRowError(f"{where}: no 'prompt', and {column!r} is no whole conversation.")
    return _joined(layout, where, row, "prompt", column)


def _read_text(layout: Layout, where: str, row: Mapping[str, Any]) -> list[Side]:
    return [{"prompt": "", "text": _text(where, row, "text")}]


KINDS = {
    kind.format: kind
    for kind in (
        Kind(
            Format(
                "preferences",
                ("chosen", "rejected"),
                ("prompt", "system", "tools"),
                ("prompt_id", "messages", "score_chosen", "score_rejected"),
            ),
            _read_preferences,
        ),
        Kind(Format("messages", ("messages",), ("system", "tools"), ("parallel_tool_calls",)), _read_messages),
        Kind(Format("ShareGPT", ("conversations",), ("system", "tools")), _read_sharegpt),
        # Stanford's `text` is instruction, input and output once more.
        Kind(Format("Alpaca", ("instruction", "output"), ("input", "system", "history"), ("text",)), _read_alpaca),
        Kind(Format("prompt and completion", ("prompt", "completion"), ("system", "tools")), _read_completion),
        Kind(Format("plain texts", ("text",)), _read_text),
    )
}
"""What can be recognised. Of kinds that fit equally well the first one is meant."""
_LAYOUTS = "Layouts are " + "; ".join(f"{each.name} ({', '.join(each.needs)})" for each in KINDS) + "."
COLUMNS = sorted({name for each in KINDS for name in (*each.needs, *each.reads)})
