"""Find the assistant's turns in a rendered conversation, exactly.

A turn begins where generation would begin, and ends behind the token that ends it. Where the template marks what the assistant
says (``{% generation %}``), the marks are read. Any other template is rendered message by message, and each part must be the
beginning of the whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_pmss.datamodules.chat import ChatTemplate, common_start, own_tokens, render, squeezed
from lightning_pmss.datamodules.conversations.messages import BadRowError, Message, short
from lightning_pmss.datamodules.conversations.templates import REMEDY

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Turn:
    """A turn of the assistant in a rendered conversation.

    Args:
        start: Its first character, the first that the model generates.
        stop: The character behind it.
        mark: The text of the token that ends it.
    """

    start: int
    stop: int
    mark: str


class TurnFinder:
    """Finds the assistant's turns in what a tokenizer's chat template makes of a conversation.

    Args:
        tokenizer: A tokenizer with a chat template.

    Raises:
        ValueError: If the template has no marks and cannot be taken apart either (`ChatTemplate`).
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        template = tokenizer.chat_template
        marked = all(_MARKS.search(text) for text in (template.values() if isinstance(template, dict) else [template]))
        self.chat = None if marked else ChatTemplate.of(tokenizer, REMEDY)
        self.own = own_tokens(tokenizer)

    @property
    def way(self) -> str:
        """How turns are found, for the log."""
        return "the template's {% generation %} marks" if self.chat is None else "rendering message by message"

    def find(
        self, messages: Sequence[Message], wanted: Sequence[int], tools: list[Any] | None
    ) -> tuple[str, list[Turn]]:
        """Return the rendered conversation and the turns ``wanted`` of the assistant, by the numbers of their messages.

        Raises:
            BadRowError: If the template leaves out or changes a message, a turn cannot be found exactly, or no token of its own
                ends it; the message says what to do.
        """
        shown = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
        text, turns = (
            self._by_marks(shown, wanted, tools) if self.chat is None else self._by_parts(shown, wanted, tools)
        )
        for place, message in enumerate(messages):
            if place in wanted:
                turn = turns[wanted.index(place)]
                self._check_said(message, text[turn.start : turn.stop], turn.mark)
            elif message["role"] != "assistant":  # a template may leave the thoughts of earlier answers out
                self._check_shown(message, text)
        return text, turns

    def _by_parts(
        self, messages: list[Message], wanted: Sequence[int], tools: list[Any] | None
    ) -> tuple[str, list[Turn]]:
        assert self.chat is not None
        whole = self._render(messages, False, tools)
        turns = []
        for place in wanted:
            prompt = self._render(messages[:place], True, tools) + self.chat.header
            upto = whole if place == len(messages) - 1 else self._render(messages[: place + 1], False, tools)
            if not upto.startswith(prompt):
                raise self._refusal(place, "does not go on from its own prompt for the answer", prompt, upto)
            stop, mark = self._end(upto[len(prompt) :])
            if not whole.startswith(upto[: len(prompt) + stop]):
                what = "renders an earlier turn otherwise once later turns follow"
                raise self._refusal(place, what, upto[: len(prompt) + stop], whole)
            turns.append(Turn(len(prompt), len(prompt) + stop, mark))
        return whole, turns

    def _by_marks(
        self, messages: list[Message], wanted: Sequence[int], tools: list[Any] | None
    ) -> tuple[str, list[Turn]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            found: Any = render_jinja_template(
                conversations=[messages],
                tools=tools,
                chat_template=self.tokenizer.get_chat_template(None, tools),
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        except Exception:  # templates raise any class; `render` says which and what to do
            self._render(messages, False, tools)
            raise
        (text,), (spans,) = found
        parts: list[list[int]] = []
        for start, stop in spans:
            if parts and parts[-1][1] == start:
                parts[-1][1] = stop
            else:
                parts.append([start, stop])
        answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        if len(parts) != len(answers):
            raise BadRowError(
                f"the chat template of {self._name} marks {len(parts)} parts of this conversation by {{% generation %}}, and"
                f" the assistant has {len(answers)} turns. Put one pair of marks around each, or give {REMEDY}."
            )
        turns = []
        # The marks may leave out the token that ends the turn, and then it is never learnt. Behind the last turn stands nothing
        # else; behind others the next turn's first token.
        rest = text[parts[-1][1] :].lstrip()
        closing = max((token for token in self.own if token and rest.startswith(token)), key=len, default="")
        for place in wanted:
            start, stop = parts[answers.index(place)]
            behind = len(text[stop:]) - len(text[stop:].lstrip())
            if closing and not self._closed(text[start:stop]) and text.startswith(closing, stop + behind):
                stop += behind + len(closing)
            length, mark = self._end(text[start:stop])
            turns.append(Turn(start, start + length, mark))
        return text, turns

    def _closed(self, turn: str) -> bool:
        return any(turn.rstrip().endswith(token) for token in self.own if token)

    def _end(self, turn: str) -> tuple[int, str]:
        """Return where ``turn`` ends, behind the token that ends it, and the text of that token."""
        if self.chat is not None and (place := turn.rfind(self.chat.mark)) >= 0:
            return place + len(self.chat.mark), self.chat.mark
        body = turn.rstrip()  # a call of a function may have an end of its own
        ending = max((token for token in self.own if token and body.endswith(token)), key=len, default=None)
        if ending is None:
            raise BadRowError(
                f"the chat template of {self._name} ends the assistant's turn with {turn[-30:]!r}, which holds no token of its"
                f" own, so generation would not stop there. Give {REMEDY}."
            )
        return len(body), ending

    @property
    def _name(self) -> str:
        return repr(getattr(self.tokenizer, "name_or_path", ""))

    def _render(self, messages: Sequence[Message], generation: bool, tools: list[Any] | None) -> str:
        try:
            return render(self.tokenizer, messages, generation, REMEDY, tools)
        except ValueError as error:
            raise BadRowError(_lower(str(error))) from error

    def _refusal(self, place: int, what: str, part: str, whole: str) -> BadRowError:
        same = len(common_start([part, whole]))
        return BadRowError(
            f"the chat template of {self._name} {what}: at message {place + 1} the part has {part[same:][:40]!r} where the"
            f" conversation has {whole[same:][:40]!r}, so its turns have no exact mask. Give --data.train_on each (one example"
            " per answer, as it would be generated), a template with {% generation %} marks, or --data.template NAME."
        )

    def _check_said(self, message: Message, turn: str, mark: str) -> None:
        """Refuse a turn that does not contain what the assistant says, or contains the end of a turn twice."""
        said, found = turn.removesuffix(mark), squeezed(turn)
        for text in (message["content"], message.get("reasoning_content", "")):
            if squeezed(text) not in found:
                raise BadRowError(
                    f"the chat template of {self._name} renders the answer {short(text)} as {short(turn)}: it leaves out or"
                    f" changes a part, so that would not be trained. Take it out of the data, or give {REMEDY}."
                )
        for call in message.get("tool_calls", ()):
            function = call["function"]
            if missing := [name for name in (function["name"], *function["arguments"]) if name not in turn]:
                raise BadRowError(
                    f"the chat template of {self._name} renders the call of {function['name']!r} as {short(turn)}, without"
                    f" {missing[0]!r}: it has no form for calls. Take them out of the data, or give a template that has one."
                )
        if mark in said:
            raise BadRowError(
                f"the answer {short(message['content'])} holds {mark!r}, which ends the assistant's turn: the chat template"
                " adds it. Take it out of the data."
            )

    def _check_shown(self, message: Message, text: str) -> None:
        """Refuse a template that leaves out what somebody else says: an answer would be trained without its question."""
        if self.chat is not None and self.chat.mark in message["content"]:
            raise BadRowError(
                f"the {message['role']}'s turn {short(message['content'])} holds {self.chat.mark!r}, which ends turns: the chat"
                " template adds it. Take it out of the data."
            )
        whole = squeezed(text)
        apart = (message["instruction"], message["input"]) if "input" in message else (message["content"],)
        quoted = squeezed(json.dumps(message["content"], ensure_ascii=False)[1:-1])  # as some show what tools return
        if not all(squeezed(part) in whole for part in apart) and quoted not in whole:
            raise BadRowError(
                f"the chat template of {self._name} leaves out or changes the {message['role']}'s turn"
                f" {short(message['content'])}. Take it out of the data, or give a template that shows it."
            )


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
