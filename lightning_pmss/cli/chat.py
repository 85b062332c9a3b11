"""``python -m lightning_pmss chat`` and ``generate``: options and calls."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields

from lightning_pmss.chat.options import AnswerOptions, FileOptions, ModelOptions
from lightning_pmss.cli.options import Options

MODEL, ANSWER, FILE = (
    Options(owner, [option.name for option in fields(owner)]) for owner in (ModelOptions, AnswerOptions, FileOptions)
)


def run_chat(parser: argparse.ArgumentParser, args: Sequence[str]) -> None:
    """Parse, load, talk.

    Raises:
        ValueError: Options that do not fit one another, or an adapter that does not fit the model.
        OSError: Something cannot be read.
    """
    for options in (MODEL, ANSWER):
        options.add_to(parser)
    given = vars(parser.parse_args(args))
    model, answers = ModelOptions(**MODEL.take(given)), AnswerOptions(**ANSWER.take(given))

    with _leaving():
        from lightning_pmss.chat.conversation import talk
        from lightning_pmss.chat.model import ChatModel

        talk(ChatModel(model), answers)


def run_generate(parser: argparse.ArgumentParser, args: Sequence[str]) -> None:
    """Parse, load, answer.

    Raises:
        ValueError: Options or prompts that do not fit, or an adapter that does not fit the model.
        OSError: Something cannot be read or written.
    """
    for options in (MODEL, FILE, ANSWER):
        options.add_to(parser)
    given = vars(parser.parse_args(args))
    model, files, answers = (
        ModelOptions(**MODEL.take(given)),
        FileOptions(**FILE.take(given)),
        AnswerOptions(**ANSWER.take(given)),
    )

    with _leaving():
        from lightning_pmss.chat.file import answer_file

        answer_file(files, model, answers)


@contextmanager
def _leaving() -> Iterator[None]:
    """Turn Ctrl-C into exit code 130, as shells do, with the notes of the exception on stderr."""
    try:
        yield
    except KeyboardInterrupt as stopped:
        print("\n".join(["stopped.", *getattr(stopped, "__notes__", [])]), file=sys.stderr)
        raise SystemExit(130) from None
