"""Show a `Summary` of training data in a terminal, or as plain text."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from typing import TextIO

from lightning_pmss.datamodules.summary import Shown, Summary, Token
from lightning_pmss.messages import one_line

_SHOWN = 500  # tokens of a row; more of it is left out in the middle
_BAR = 40
# Two shades of each colour, one after the other, show where a token ends.
_COLOURS = {True: ("\033[1;32m", "\033[1;92m"), False: ("\033[90m", "\033[37m")}
_RESET = "\033[0m"


def in_colour(stream: TextIO) -> bool:
    """Whether a stream takes colours: a terminal, without ``NO_COLOR``."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def text_of(summary: Summary, speed: float | None = None, colour: bool = False, encoding: str | None = None) -> str:
    """Return rows, lengths and steps as text.

    Args:
        summary: The training data.
        speed: Tokens per second of all devices together; null: no time is given.
        colour: Use colours for the trained tokens; else marks around them.
        encoding: Of the stream; marks and bars are ASCII where it has no others.
    """
    wide = _takes("⟦⟧█", encoding or sys.stdout.encoding)
    marks, bar = (("⟦", "⟧"), "█") if wide else (("[[", "]]"), "#")
    legend = "trained tokens are green" if colour else f"trained tokens are in {marks[0]} {marks[1]}"
    lines = [f"The first rows as the model sees them; {legend}.", ""]
    for row in summary.rows:
        trained = sum(token.trained for token in row.tokens)
        lines += [f"--- {row.title}: {len(row.tokens):,} tokens, {trained:,} trained", _row(row, marks, colour), ""]
    for title, figures in tables(summary, speed):
        lines.append(title)
        lines += [f"  {name:<22} {value}" for name, value in figures]
        lines.append("")
    lines.append("Lengths, in tokens")
    most = max(count for *_, count in summary.histogram())
    for low, high, count in summary.histogram():
        drawn = bar * (max(1, round(_BAR * count / most)) if count else 0)
        lines.append(f"  {f'{low:,}-{high:,}' if high > low else f'{low:,}':>13} {count:>8,} {drawn}".rstrip())
    return "\n".join(lines)


def tables(summary: Summary, speed: float | None) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return the figures of a summary in words, under headings."""
    examples, run = len(summary.lengths), summary.run
    tokens, trained = sum(summary.lengths), sum(summary.trained)
    read = summary.available + summary.left_out
    share, most = summary.left_out / read, summary.max_length
    data = [("examples", f"{examples:,} to train on, {summary.validation:,} to validate on")]
    if examples < summary.available:
        data.append(("chosen by train_limit", f"{examples:,} of {summary.available:,}"))
    if summary.kinds:
        data.append(("of each kind", ", ".join(f"{one_line(kind)} {count:,}" for kind, count in summary.kinds.items())))
    data += [
        (
            "left out, too long",
            f"{summary.left_out:,} of {read:,} ({share:.1%}), max_length {most:,}",
        ),
        ("cut, too long", f"{summary.cut:,} of {read:,} ({summary.cut / read:.1%})"),
    ]
    if summary.skipped:
        data.append(("bad rows, skipped", f"{summary.skipped:,}"))
    shares = ((0.5, "50 %"), (0.9, "90 %"), (0.95, "95 %"), (0.99, "99 %"))
    percentiles = ", ".join(f"{name} {summary.percentile(share):,}" for share, name in shares)
    data += [
        ("tokens per example", f"shortest {min(summary.lengths):,}, {percentiles}, longest {max(summary.lengths):,}"),
        ("tokens per epoch", f"{tokens:,}, of which {trained:,} trained ({trained / tokens:.1%})"),
        ("padding", f"{summary.padding:.1%} of the tokens computed"),
    ]
    if summary.packed is not None:
        data.append(("packed rows", f"{summary.packed:,} of at most {most:,} tokens"))
    unit = "packed rows" if summary.packed is not None else "examples"
    sizes = f"{summary.batch_size} {unit} per batch, {run.devices} device{'s' * (run.devices > 1)}"
    sizes += f", {run.accumulate} batches accumulated" if run.accumulate > 1 else ""
    steps = "no end: neither max_epochs nor max_steps" if summary.steps is None else f"{summary.steps:,}"
    if summary.steps is not None and summary.steps_per_epoch:
        steps += f" ({summary.steps / summary.steps_per_epoch:.2f} epochs)"
    plan = [
        ("per optimizer step", f"{summary.batch_size * run.devices * run.accumulate} {unit}: {sizes}"),
        ("steps per epoch", f"{summary.steps_per_epoch:,}, from {summary.batches_per_epoch:,} batches per device"),
        ("steps in the run", steps),
        ("time", _time(summary, speed)),
    ]
    return [("Data", data), ("Run", plan)]


def _time(summary: Summary, speed: float | None) -> str:
    tokens = summary.tokens_of_run
    if tokens is None:
        return "none for a run without an end"
    if speed is None:
        return "not estimated; type --tokens-per-second with pmss/tokens_per_second from the log of a run"
    minutes = round(tokens / speed / 60)
    spoken = f"{minutes // 60} h {minutes % 60} min" if minutes else "under a minute"
    return f"{spoken} of training, for {tokens:,.0f} tokens at {speed:,.0f} per second"


def _row(row: Shown, marks: tuple[str, str], colour: bool) -> str:
    hidden = len(row.tokens) - _SHOWN
    if hidden <= 0:
        return "".join(_drawn(row.tokens, marks, colour))
    head, tail = row.tokens[: _SHOWN // 2], row.tokens[-_SHOWN // 2 :]
    between = f"\n... {hidden:,} tokens ...\n"
    return "".join(_drawn(head, marks, colour)) + between + "".join(_drawn(tail, marks, colour))


def _drawn(tokens: Sequence[Token], marks: tuple[str, str], colour: bool) -> Iterator[str]:
    inside = False
    for place, token in enumerate(tokens):
        if colour:
            yield f"{_COLOURS[token.trained][place % 2]}{visible(token.text)}{_RESET}"
            continue
        if token.trained != inside:
            yield marks[0] if token.trained else marks[1]
            inside = token.trained
        yield visible(token.text)
    if inside:
        yield marks[1]


def visible(text: str) -> str:
    """Return a text without characters that a terminal would act on; line ends stay."""
    return "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in text)


def _takes(text: str, encoding: str | None) -> bool:
    try:
        text.encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
