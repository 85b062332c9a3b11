"""What keeps the records of runs comparable whose tokens had one blank more."""

from __future__ import annotations

from typing import Any

from lightning_pmss.datamodules.continuations import continued, tokens_of


def second_blank(tokenizer: Any) -> str:
    """Return a blank where a tokenizer begins each text with one, as that of stories260K does; else nothing.

    With such a tokenizer the responses of the studies' own tasks had two blanks when the first records were made. They keep
    them, so that later runs are of the same tokens.
    """
    return " " if tokens_of(tokenizer, ["a"]) == continued(tokenizer, ["->"], [" a"])[1] else ""
