"""Take a tokenizer's chat template apart: the prompt, the text of an answer's turn, and the token that ends the turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_pmss.datamodules.continuations import tokens_of

Turn = dict[str, Any]
"""One message: ``role``, ``content``, and whatever else a template reads, such as ``tool_calls``."""

PLAIN = "--data.prompt_style plain"
"""What to type for prompts without a chat template, in modules of questions and answers."""

# Two answers that differ in their first and their last character, to see what a template puts around an answer.
_QUESTION, _ANSWERS = "Question", ("Hello", "World")


def turns(*pairs: tuple[str, str]) -> list[Turn]:
    """Return turns of user and assistant."""
    return [turn for asked, said in pairs for turn in (_turn("user", asked), _turn("assistant", said))]


def _turn(role: str, content: str) -> Turn:
    return {"role": role, "content": content}


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template, taken apart by rendering it.

    Args:
        tokenizer: A tokenizer with a chat template.
        header: Text in front of each answer, if the template itself has no prompt for generation.
        tail: Text behind an answer.
        end: The part of ``tail`` up to the token that ends the turn.
        end_id: That token.
        remedy: What to type where the template does not fit, for messages.
    """

    tokenizer: Any
    header: str
    tail: str
    end: str
    end_id: int
    remedy: str = PLAIN

    @classmethod
    def of(cls, tokenizer: Any, remedy: str = PLAIN) -> ChatTemplate:
        """Take the template of ``tokenizer`` apart.

        Args:
            tokenizer: A tokenizer with a chat template.
            remedy: What to type where the template does not fit, for messages.

        Raises:
            ValueError: If it has none, an answer's turn does not extend the prompt, an answer is not in its turn as it is,
                or no token of its own ends the turn; the message says what to do.
        """
        name = getattr(tokenizer, "name_or_path", "")
        if not tokenizer.chat_template:
            raise ValueError(f"The tokenizer {name!r} has no chat template; use {remedy}.")
        asked = [_turn("user", _QUESTION)]
        prompt, bare = (render(tokenizer, asked, generation, remedy) for generation in (True, False))
        if _QUESTION not in prompt:
            raise ValueError(
                f"The chat template of {name!r} renders the question {_QUESTION!r} as {prompt[-60:]!r}, without it. Give a"
                f" tokenizer with another chat template, or {remedy}."
            )
        behind = [_difference(tokenizer, prompt, [*asked, _turn("assistant", answer)], remedy) for answer in _ANSWERS]
        head = common_start(behind)
        tail = common_start([text[::-1] for text in behind])[::-1]
        if any(text != head + answer + tail for text, answer in zip(behind, _ANSWERS, strict=True)):
            raise ValueError(
                f"The chat template of {name!r} renders the answer {_ANSWERS[0]!r} as {behind[0]!r}, so it would not be"
                f" trained as it is. Give a tokenizer with another chat template, or {remedy}."
            )
        # Blanks stay with the answer, because tokenizers merge them with the word that follows.
        header = head.rstrip(" ") if prompt == bare and head.strip() else ""
        return cls(tokenizer, header, tail, *_end_of_turn(tokenizer, tail, remedy), remedy)

    @property
    def mark(self) -> str:
        """The text of the token that ends the turn."""
        return str(self.tokenizer.convert_ids_to_tokens(self.end_id))

    def prompt(self, question: str, earlier: Sequence[Turn] = ()) -> str:
        """Return the text that an answer to ``question`` follows.

        Args:
            question: The user's question.
            earlier: Earlier turns.
        """
        return render(self.tokenizer, [*earlier, _turn("user", question)], True, self.remedy) + self.header

    def answer(self, prompt: str, question: str, response: str, earlier: Sequence[Turn] = ()) -> str:
        """Return the text behind ``prompt`` that says ``response`` and ends the turn.

        It is the difference between the conversation with and without the answer's turn, up to the token that ends the
        turn: the model stops there.

        Raises:
            ValueError: If the turn does not extend the prompt, the template leaves out a part of the response, or the
                response itself contains the end of the turn.
        """
        whole = [*earlier, _turn("user", question), _turn("assistant", response)]
        text = _difference(self.tokenizer, prompt, whole, self.remedy)
        said = text.removesuffix(self.tail)
        if said == text and self.tail or squeezed(response) not in squeezed(said):
            raise ValueError(
                f"The chat template of {self.tokenizer.name_or_path!r} renders the response {response[:60]!r} as"
                f" {text[:60]!r}: it leaves out or changes a part, so that would not be trained. Take it out of the data, or"
                f" give {self.remedy}."
            )
        if self.end.strip() in said:
            raise ValueError(
                f"The response {response[-60:]!r} holds {self.end.strip()!r}, which ends the assistant's turn: the chat"
                " template adds it. Take it out of the data."
            )
        return said + self.end


def end_of_turn(tokenizer: Any) -> int | None:
    """Return the token that ends the assistant's turn in a tokenizer's chat template, ``None`` if none is known."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        return ChatTemplate.of(tokenizer).end_id
    except ValueError:  # another kind of conversation; the chat style raises this error to the user
        return None


def render(
    tokenizer: Any, messages: Sequence[Turn], generation: bool, remedy: str = PLAIN, tools: list[Any] | None = None
) -> str:
    """Return the text that the chat template makes of ``messages``.

    Args:
        tokenizer: A tokenizer with a chat template.
        messages: The turns.
        generation: End with the text in front of an answer.
        remedy: What to type where the template refuses them, for the message.
        tools: Descriptions of functions that the assistant may call.

    Raises:
        ValueError: If the template refuses them; the message says why.
    """
    try:
        return str(
            tokenizer.apply_chat_template(list(messages), tools=tools, tokenize=False, add_generation_prompt=generation)
        )
    except Exception as error:  # templates raise any class, and jinja its own
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(
            f"The chat template of {getattr(tokenizer, 'name_or_path', '')!r} refuses the turns {roles}"
            f" ({type(error).__name__}: {error}). Give a tokenizer with another chat template, or {remedy}."
        ) from error


def _difference(tokenizer: Any, prompt: str, messages: list[Turn], remedy: str) -> str:
    """Render ``messages`` and return the text behind ``prompt``."""
    whole = render(tokenizer, messages, False, remedy)
    if not whole.startswith(prompt):
        same = len(common_start([whole, prompt]))
        raise ValueError(
            f"The chat template of {getattr(tokenizer, 'name_or_path', '')!r} does not go on from its prompt: where the"
            f" prompt has {prompt[same:][:40]!r}, the conversation with the answer has {whole[same:][:40]!r}. What is trained"
            f" would not be what is asked for. Give a tokenizer with another chat template, or {remedy}."
        )
    return whole[len(prompt) :]


def own_tokens(tokenizer: Any) -> dict[str, int]:
    """Return the tokens that are read as one wherever their text stands, by their texts."""
    known: dict[str, int] = dict(tokenizer.get_added_vocab())
    if tokenizer.eos_token is not None:
        known[str(tokenizer.eos_token)] = int(tokenizer.eos_token_id)
    return known


def _end_of_turn(tokenizer: Any, tail: str, remedy: str) -> tuple[str, int]:
    """Return the part of ``tail`` up to the first token of its own, and that token."""
    known = own_tokens(tokenizer)
    places = sorted((tail.find(text), -len(text), text) for text in known if text and text in tail)
    if not places:
        raise ValueError(
            f"The chat template of {getattr(tokenizer, 'name_or_path', '')!r} ends the assistant's turn with {tail!r}, which"
            " holds no token of its own, so generation would not stop there. Write {{ eos_token }} behind the assistant's"
            f" content in the template (or add the marks that it uses to the tokenizer), or give {remedy}."
        )
    start, _, text = places[0]
    end = tail[: start + len(text)]
    if tokens_of(tokenizer, [end])[0][-1:] != [known[text]]:
        raise ValueError(
            f"The tokenizer {getattr(tokenizer, 'name_or_path', '')!r} reads {text!r}, which ends the assistant's turn, as"
            f" other tokens than {known[text]}. Give a tokenizer that has it as a special token, or {remedy}."
        )
    return end, known[text]


def common_start(texts: Sequence[str]) -> str:
    """Return the longest beginning that all ``texts`` have."""
    first, last = min(texts), max(texts)
    for place, char in enumerate(first):
        if place >= len(last) or char != last[place]:
            return first[:place]
    return first


def squeezed(text: str) -> str:
    """Return ``text`` without blanks and line ends, which templates trim."""
    return "".join(text.split())
