"""Change an adapter folder as a bad disk or a person would, and write its checksums anew where that is not the point."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lightning_pmss.store import describe_tensors

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors and leave the checksums as they are."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the config."""
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))


def seal(folder: Path) -> None:
    """Write the checksums of the tensors as they are now, so that only other checks can refuse them."""
    tensors = load_file(folder / WEIGHTS)
    edit_config(folder, lambda config: config.update(tensors=describe_tensors(tensors)))


def flip(file: Path, byte: int, bit: int) -> None:
    """Turn over one bit."""
    content = bytearray(file.read_bytes())
    content[byte] ^= 1 << bit
    file.write_bytes(content)


def data_begins(file: Path) -> int:
    """Where the numbers of a safetensors file begin, behind the header."""
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")
