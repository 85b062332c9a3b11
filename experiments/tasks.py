"""The tasks by name: the data module to train on, and what is scored after a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.cloze import ClozeDataModule
from experiments.pairs import PairsDataModule
from experiments.passages import PassagesDataModule
from lightning_pmss.datamodules import GSM8KDataModule, InstructionDataModule

TASKS = ("gsm8k", "cloze", "pairs")


def data_module(task: Mapping[str, Any], data: Path, tokenizer: str, seed: int, cache: Path) -> InstructionDataModule:
    """The data module of a task; ``seed`` is that of the order of training.

    Args:
        task: ``name`` and arguments of the data module.
        data: Folder with ``gsm8k``, ``commonsense`` and ``drop``.
        tokenizer: Folder of the tokenizer.
        seed: The validation set is drawn by it too, so runs to be compared share it.
        cache: Folder for tokenised data.
    """
    options: dict[str, Any] = {"seed": seed, "cache_dir": str(cache)} | dict(task)
    name = options.pop("name")
    if name == "gsm8k":
        return GSM8KDataModule(tokenizer, path=str(data / "gsm8k"), **options)
    if name == "cloze":
        return ClozeDataModule(tokenizer, path=str(data / "commonsense"), **options)
    if name == "pairs":
        return PairsDataModule(tokenizer, pairs_seed=seed, **options)
    raise ValueError(f"task {name!r} is not known; choose one of {list(TASKS)}.")


def prose(data: Path, tokenizer: str, cache: Path) -> PassagesDataModule:
    """DROP's passages, to see what is forgotten."""
    path = str(data / "drop" / "drop_v0_dev_250.jsonl")
    return PassagesDataModule(tokenizer, path, eval_batch_size=8, val_size=0, cache_dir=str(cache))
