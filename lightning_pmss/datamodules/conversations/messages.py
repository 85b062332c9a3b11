"""Check messages of many layouts, and write them in one: OpenAI's, with arguments of calls as objects."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_pmss.datamodules.columns import filled

Message = dict[str, Any]

_TAGS = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bing", "bard", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response", "function", "ipython"), "tool"),
    "system": "system",
    "developer": "developer",
}
"""The names that data sets have for the four roles, and what a chat template calls them."""
_READ = {
    "role", "from", "content", "value", "tool_calls", "function_call", "tool_call_id", "name", "reasoning_content",
    "reasoning", "thinking", "weight",
}  # fmt: skip

OR_SKIP = " Correct it, or leave bad rows out: --data.on_bad_row skip."
"""What to do about a row that no other option reads."""


class BadRowError(ValueError):
    """A row that nothing can be trained on: refused with its place, or skipped and counted."""


def short(value: object, most: int = 60) -> str:
    """Return the beginning of a value's ``repr``."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def read_messages(
    where: str, given: Any, column: str, roles: Mapping[str, str], ignored: Sequence[str] = ()
) -> list[Message]:
    """Return the messages of one row, checked one by one (`check_order` checks their order).

    Args:
        where: The row's place.
        given: A list of objects with role and content, or from and value; or the JSON text of one.
        column: The column that they are in.
        roles: Further names of roles.
        ignored: Keys that may be filled though nothing reads them, with the column and a dot in front.

    Raises:
        BadRowError: If a message is not readable; the message has the place and the number of the message, from 1.
    """
    if isinstance(given, str):
        given = read_json(where, given, repr(column))
    if not isinstance(given, list):
        raise BadRowError(f"{where}: {column!r} is {short(given)}; it must be a list of messages.")
    if not given:
        raise BadRowError(
            f"{where}: {column!r} is an empty list; a conversation needs a user's and an assistant's turn."
        )
    known = {**_TAGS, **roles}
    return [
        _message(f"{where}: message {number} of {column!r}", each, column, known, ignored)
        for number, each in enumerate(given, 1)
    ]


def _message(where: str, given: Any, column: str, known: Mapping[str, str], ignored: Sequence[str]) -> Message:
    if not isinstance(given, Mapping):
        raise BadRowError(f"{where} is {short(given)}; it must be an object with role and content, or from and value.")
    tag = given.get("role", given.get("from"))
    if "role" not in given and "from" not in given:
        raise BadRowError(f"{where} has neither 'role' nor 'from', but {sorted(map(str, given))}.")
    if not isinstance(tag, str):
        raise BadRowError(f"{where} has the role {short(tag)}, {type(tag).__name__}; it must be a text.{OR_SKIP}")
    if tag not in known:
        raise BadRowError(
            f"{where} has the role {tag!r}; known are {', '.join(known)}. Others can be named:"
            f" --data.roles '{{{tag}: assistant}}'."
        )
    unread = [
        str(key)
        for key, value in given.items()
        if key not in _READ and f"{column}.{key}" not in ignored and filled(value)
    ]
    if unread:
        raise BadRowError(
            f"{where} has {unread[0]!r} filled ({short(given[unread[0]])}), which nothing reads. Leave it out on purpose:"
            f" --data.ignore_columns '[{column}.{unread[0]}]'."
        )
    message: Message = {"role": known[tag]}
    content = _content(where, given.get("content", given.get("value")))
    calls = given.get("tool_calls")
    if filled(given.get("function_call")):
        calls = [given["function_call"]]
    elif tag == "function_call":
        found = read_json(where, content, "the call")
        calls, content = found if isinstance(found, list) else [found], ""
    if filled(calls):
        if message["role"] != "assistant":
            raise BadRowError(f"{where} calls a function, and its role is {tag!r}; only the assistant calls functions.")
        message["tool_calls"] = read_calls(where, calls)
    if not content.strip() and "tool_calls" not in message and message["role"] != "tool":
        raise BadRowError(f"{where}, the {message['role']}'s, is empty ({content!r}).{OR_SKIP}")
    message["content"] = content
    for key in ("tool_call_id", "name"):
        if filled(given.get(key)):
            message[key] = given[key]
    for key in ("reasoning_content", "reasoning", "thinking"):
        if filled(given.get(key)):
            message["reasoning_content"] = _content(where, given[key])
    weight = given.get("weight")
    if weight is not None:
        if weight not in (0, 1) or message["role"] != "assistant":
            raise BadRowError(
                f"{where} has the weight {weight!r}; an assistant's message may have 0 (not trained) or 1."
            )
        message["weight"] = int(weight)
    return message


def _content(where: str, content: Any) -> str:
    """Return a text, or the texts of OpenAI's list of parts as one; null as the empty text."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, Mapping) for part in content):
        if other := next(
            (part for part in content if part.get("type", "text") != "text" or not isinstance(part.get("text"), str)),
            None,
        ):
            raise BadRowError(f"{where} has a part of type {other.get('type')!r}; only texts are read.")
        return "".join(part["text"] for part in content)
    raise BadRowError(f"{where} has the content {short(content)}, {type(content).__name__}; it must be a text.")


def read_calls(where: str, calls: Any) -> list[dict[str, Any]]:
    """Return the calls of functions in a message as OpenAI has them, their arguments as objects.

    Raises:
        BadRowError: If one has no name, or arguments that are no JSON object.
    """
    if not isinstance(calls, list):
        raise BadRowError(f"{where} has tool_calls that are {short(calls)}; they must be a list.")
    made = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if (
            not isinstance(function, Mapping)
            or not isinstance(function.get("name"), str)
            or not function["name"].strip()
        ):
            raise BadRowError(f"{where} has the call {short(call)}; it must have a function with a name.")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = read_json(where, arguments or "{}", f"the arguments of {function['name']!r}")
        if not isinstance(arguments, Mapping):
            raise BadRowError(
                f"{where} calls {function['name']!r} with {short(arguments)}; arguments must be an object."
            )
        one: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}}
        if filled(call.get("id")):
            one["id"] = call["id"]
        made.append(one)
    return made


def read_json(where: str, text: str, what: str) -> Any:
    """Return what a JSON text in a column means.

    Raises:
        BadRowError: If it is none.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise BadRowError(f"{where}: {what} is {short(text)}, which is no JSON ({error.msg}).{OR_SKIP}") from error
    except (RecursionError, ValueError) as error:
        raise BadRowError(
            f"{where}: {what} is {short(text)}, JSON that Python does not read ({error}).{OR_SKIP}"
        ) from error


def check_order(where: str, messages: Sequence[Message]) -> None:
    """Refuse messages whose roles are out of order.

    In order are: at most one system turn, the first one; then a user's turn; answers of the assistant to it, to a user or to
    tools that it called; an assistant's turn at the end.

    Raises:
        BadRowError: If they are not; the message says which is.
    """
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise BadRowError(
            f"{where}: no assistant turn (the roles are {', '.join(roles)}), so there is nothing to train on.{OR_SKIP}"
        )
    before = "start"
    for number, role in enumerate(roles, 1):
        role = "system" if role == "developer" else role
        if role not in _AFTER[before]:
            if role == "tool":
                rule = "a tool answers a call of the assistant"
            else:
                rule = f"behind {_IN_WORDS[before]} comes {' or '.join(_IN_WORDS[each] for each in _AFTER[before])}"
            raise BadRowError(
                f"{where}: roles out of order: message {number} is {_IN_WORDS[role]}, but {rule}.{OR_SKIP}"
            )
        before = role
        if role == "assistant" and messages[number - 1].get("tool_calls"):
            before = "call"
    if roles[-1] != "assistant":
        raise BadRowError(
            f"{where}: the last message is {_IN_WORDS[roles[-1]]}, which nothing answers. Take it out, or add the answer."
        )
    if not any(message.get("weight", 1) for message in messages if message["role"] == "assistant"):
        raise BadRowError(
            f"{where}: all of the assistant's turns have the weight 0, so there is nothing to train on.{OR_SKIP}"
        )


_AFTER = {
    "start": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "call": ("tool", "user"),
    "tool": ("tool", "assistant"),
}
_IN_WORDS = {
    "start": "the beginning",
    "system": "a system turn",
    "developer": "a developer's turn",
    "user": "a user's turn",
    "assistant": "an assistant's turn",
    "call": "a call of the assistant",
    "tool": "a tool's answer",
}
