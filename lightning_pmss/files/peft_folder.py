"""An adapter folder as peft writes it: its config and its tensors, for every kind of adapter that is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_pmss.files.adapter_file import CONFIG_FILE, WEIGHTS_FILE
from lightning_pmss.store import not_finite, read_json, read_tensors
from lightning_pmss.store.shards import few

PREFIX = "base_model.model."  # of peft's keys
AGAIN = "Copy the folder again, or write it anew with peft."
IN_PEFT = "PeftModel.from_pretrained(model, folder).merge_and_unload()."
QUANTISED = "a quantised form, whose shapes cannot be compared. Give the unquantised base."


def read_config(folder: Path) -> Any:
    """The content of ``adapter_config.json``, not checked yet.

    Raises:
        FileNotFoundError: The folder or one of its two files is missing.
        ValueError: It is damaged.
    """
    if missing := [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} lacks {' and '.join(missing)}: not a complete adapter folder of peft.")
    return read_json(folder / CONFIG_FILE, AGAIN)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of ``adapter_model.safetensors`` under peft's keys.

    Raises:
        ValueError: The file is damaged, or has NaN or infinite values.
    """
    tensors = read_tensors(folder / WEIGHTS_FILE, AGAIN)
    if broken := not_finite(tensors):
        raise ValueError(f"{folder / WEIGHTS_FILE}: NaN or infinite values in {few(broken)}. Use an earlier adapter.")
    return tensors
