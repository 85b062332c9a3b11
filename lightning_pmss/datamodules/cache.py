"""Tokenise texts once, into a file that later runs and all ranks read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_pmss.datamodules.prompts import Example, PromptEncoder
from lightning_pmss.datamodules.splits import group_numbers

if TYPE_CHECKING:
    from datasets import Dataset


def encode(
    examples: Sequence[Example], encoder: PromptEncoder, cache_dir: str | None, name: str, ids: Sequence[int] | None
) -> Dataset:
    """Return examples as tokens: from the cache if they were tokenised before, else with a progress bar.

    Args:
        examples: The texts.
        encoder: Makes the tokens.
        cache_dir: Folder of the cache; the one of ``datasets`` if null.
        name: Name of the data for the progress bar.
        ids: The number of each example; null: 0, 1, ...
    """
    rows: dict[str, list[Any]] = {
        "id": list(range(len(examples)) if ids is None else ids),
        "group": group_numbers(examples),
        "question": [example.question for example in examples],
        "response": [example.response for example in examples],
        "target": [example.response if example.target is None else example.target for example in examples],
    }
    return tokenised(rows, encoder, ["question", "response"], encoder.fingerprint(examples, ids), cache_dir, name)


def tokenised(
    rows: dict[str, list[Any]],
    encoder: Callable[[dict[str, list[Any]]], dict[str, list[Any]]],
    texts: list[str],
    fingerprint: str,
    cache_dir: str | None,
    name: str,
) -> Dataset:
    """Return rows with the columns that an encoder makes, from the cached file if there is one.

    Args:
        rows: The columns.
        encoder: Makes columns of a batch of rows; picklable.
        texts: Columns that only the encoder reads; they are left out.
        fingerprint: Hash of all that the result depends on, the name of the cached file.
        cache_dir: Folder of the cache; the one of ``datasets`` if null.
        name: Name of the data for the progress bar.
    """
    import datasets

    folder = Path(cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "lightning_pmss")
    folder.mkdir(parents=True, exist_ok=True)
    return datasets.Dataset.from_dict(rows).map(
        encoder,
        batched=True,
        remove_columns=texts,
        cache_file_name=str(folder / f"{fingerprint}.arrow"),
        load_from_cache_file=True,
        new_fingerprint=fingerprint,  # `datasets` would hash the tokenizer, whose state changes when it is used
        desc=f"Tokenising {name}",
    )
