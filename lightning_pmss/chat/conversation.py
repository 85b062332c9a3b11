"""A conversation in the terminal: lines and commands in, streamed answers out."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TextIO

import torch

from lightning_pmss.chat.model import NONE, ChatModel
from lightning_pmss.chat.options import AnswerOptions
from lightning_pmss.chat.stream import Stream
from lightning_pmss.evaluation.generation import eos_ids

HELP = """/adapter NAME   answer with this adapter from now on; /adapter none: with the base alone; /adapter lists all
/again          answer the last question again, with another adapter for instance
/reset          forget the conversation; the seed begins again too
/help           this list
/exit           leave (Ctrl-D does too)
A backslash at the end of a line continues the message on the next line. Ctrl-C ends an answer; at the prompt it leaves."""


class Conversation:
    """The turns so far, and how a line continues them.

    Args:
        model: Who answers.
        options: How answers are chosen.
        out: Where answers and replies go.
        about: Where figures about an answer go.
    """

    def __init__(self, model: ChatModel, options: AnswerOptions, out: TextIO, about: TextIO) -> None:
        self.model, self.options, self.out, self.about = model, options, out, about
        self.turns: list[dict[str, str]] = []
        self.ends = eos_ids(model.model, model.tokenizer)
        torch.manual_seed(options.seed)

    def take(self, line: str) -> bool:
        """Act on one line of the user; return whether the conversation goes on."""
        word, _, rest = line.strip().partition(" ")
        if not line.startswith("/"):
            if line.strip():
                self.ask(line)
            return True
        if word == "/exit":
            return False
        commands = {"/adapter": self.adapter, "/again": self.again, "/reset": self.reset, "/help": self.help}
        if word not in commands:
            self.say(
                f"there is no command {word}; /help lists them. A message that begins with / needs a blank before it."
            )
        else:
            commands[word](rest.strip())
        return True

    def say(self, text: str) -> None:
        """Show a reply to a command."""
        print(text, file=self.out, flush=True)

    def help(self, _: str) -> None:
        """List the commands."""
        self.say(HELP)

    def reset(self, _: str) -> None:
        """Forget the turns."""
        self.turns.clear()
        torch.manual_seed(self.options.seed)
        self.say("The conversation begins again.")

    def adapter(self, name: str) -> None:
        """Switch to another adapter, or list them."""
        if name:
            try:
                self.model.use(None if name == NONE else name)
            except ValueError as error:
                self.say(str(error))
                return
        active = self.model.active or NONE
        self.say("  ".join(f"{known} (active)" if known == active else known for known in [*self.model.adapters, NONE]))

    def again(self, _: str) -> None:
        """Answer the last question again."""
        if not self.turns:
            self.say("there is no question yet.")
            return
        question = self.turns[-2]["content"]
        del self.turns[-2:]
        self.ask(question)

    def ask(self, question: str) -> None:
        """Stream the answer to a question, and remember both."""
        turns = [*self.turns, {"role": "user", "content": question}]
        try:
            (row,) = self.model.tokens([self.model.prompt(turns)])
        except ValueError as error:  # a template that refuses these turns
            self.say(str(error))
            return
        limit = self.model.context
        room = self.options.max_new_tokens if limit is None else min(self.options.max_new_tokens, limit - len(row))
        if room < 1:
            self.say(
                f"the conversation has {len(row)} tokens, and the model reads at most {limit}; /reset begins again."
            )
            return
        stream = Stream(self.model.tokenizer, self.ends, self.options.stop, self._write)
        self._write(f"{self.model.active or 'model'}> ")
        began, stopped = time.perf_counter(), ""
        try:
            (text,) = self.model.answer([row], replace(self.options, max_new_tokens=room), stream)
        except KeyboardInterrupt:
            stream.end()
            text, stopped = stream.text.strip(), ", stopped"
        seconds = time.perf_counter() - began
        if stream.tokens >= room:
            stopped = ", cut at the length limit"
        self._write("\n")
        print(
            f"[{stream.tokens} tokens, {stream.tokens / seconds:.1f} per second{stopped}]", file=self.about, flush=True
        )
        self.turns = [*turns, {"role": "assistant", "content": text}]

    def _write(self, text: str) -> None:
        self.out.write(text)
        self.out.flush()


def lines(prompt: str = "you> ") -> Iterator[str]:
    """Yield the user's messages until the end of the input or Ctrl-C."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 -- arrow keys in input()
    typed: list[str] = []
    while True:
        try:
            line = input("... " if typed else prompt)
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not sys.stdin.isatty():  # a terminal shows what is typed, a pipe does not
            print(line)
        if line.endswith("\\"):
            typed.append(line[:-1])
            continue
        yield "\n".join([*typed, line])
        typed.clear()


def talk(model: ChatModel, options: AnswerOptions) -> None:
    """Hold a conversation on standard input and output."""
    conversation = Conversation(model, options, sys.stdout, sys.stderr)
    conversation.say(f"{model}; {model.form}; {options}. /help lists the commands, /exit leaves.")
    if model.adapters:
        conversation.adapter("")
    for line in lines():
        if not conversation.take(line):
            return
