"""Save and copy tokenizers and processors."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_pmss.store.kinds import ADAPTER, GENERATION, TOKENIZER, entries, matches


def save_processing(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer or processor, or a list of them, by ``save_pretrained``; None writes nothing."""
    if tokenizer is not None:
        for part in tokenizer if isinstance(tokenizer, Sequence) else [tokenizer]:
            part.save_pretrained(folder)


def copy_processing(adapter: Path, folder: Path) -> list[str]:
    """Copy an adapter's tokenizer, if it has one: it has the added tokens, and the chat template of the training.

    The generation config beside it has the tokens that end a turn there. Return the names of the files.
    """
    listed = ADAPTER.listed(adapter)
    names = [
        name
        for name, entry in entries(adapter)
        if entry.is_file(follow_symlinks=False) and name in listed and matches(name, (*TOKENIZER, GENERATION))
    ]
    for name in names:
        if not (folder / name).exists():  # else already written by the caller
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(adapter / name, folder / name)
    return names
