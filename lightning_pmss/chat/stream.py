"""Show an answer token by token."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import Tensor
from transformers import TextStreamer

from lightning_pmss.evaluation.generation import cut


class Stream(TextStreamer):
    """Writes an answer word by word as it is generated, up to its end token or stop text.

    Args:
        tokenizer: The model's tokenizer.
        ends: Tokens that end the answer; they are not shown.
        stop: Texts that end it; a part that may become one is held back.
        write: Function that shows a piece of text.
    """

    def __init__(
        self, tokenizer: Any, ends: Collection[int], stop: Sequence[str], write: Callable[[str], object]
    ) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.ends, self.stop, self.write = ends, stop, write
        self.text = ""
        """The answer so far."""
        self.tokens = 0
        self._shown = 0

    def put(self, value: Tensor) -> None:
        """Take the next tokens."""
        if not self.next_tokens_are_prompt:
            if int(value) in self.ends:
                return
            self.tokens += 1
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Show what cannot change any more."""
        self.text = (self.text + text).lstrip()
        whole = cut(self.text, self.stop)
        held = (
            0 if stream_end or whole != self.text else max((_beginning(whole, word) for word in self.stop), default=0)
        )
        piece = whole[: len(whole) - held].rstrip()[self._shown :]  # blanks at the end are no part of an answer
        if piece:
            self._shown += len(piece)
            self.write(shown(piece))


def shown(text: str) -> str:
    """Return a text without characters that a terminal would act on."""
    return "".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in text)


def _beginning(text: str, word: str) -> int:
    """Return how many characters at the end of a text are the beginning of a word."""
    return next((n for n in range(min(len(word) - 1, len(text)), 0, -1) if text.endswith(word[:n])), 0)
