"""The Python blocks of docs/export.md run in their order, on the folder that its first command wrote."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_pmss.cli import main
from lightning_pmss.files import save_adapter

pytest.importorskip("peft")
PAGE = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")


def test_blocks_and_commands_run(tiny_llama: str, tmp_path: Path, train: Any, logits: Callable[..., Any]) -> None:
    model = train(AutoModelForCausalLM.from_pretrained(tiny_llama))
    folders = {"MODEL_DIR": tiny_llama, "ADAPTER_DIR": str(save_adapter(model, tmp_path / "adapter"))}
    folders |= {"LORA_DIR_2": str(tmp_path / "second"), "LORA_DIR": str(tmp_path / "first")}

    def filled(text: str) -> str:
        for name, folder in folders.items():
            text = text.replace(name, folder)
        return text

    commands = re.findall(r"^    (?:\$ )?python -m lightning_pmss (.*)$", PAGE, re.MULTILINE)
    assert len(commands) == 3
    real = {"models/SmolLM2-135M-Instruct": "MODEL_DIR", "runs/gsm8k/version_0/adapter": "ADAPTER_DIR"}
    for number, command in enumerate(commands):
        words = [real.get(word, word) for word in shlex.split(command)]
        if number:
            words[words.index("--output") + 1] = str(tmp_path / f"output{number}")
        main([filled(word) for word in words])
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(filled(block), names)  # noqa: S102
    torch.testing.assert_close(logits(names["model"]), logits(model), rtol=1e-4, atol=1e-5)
    assert (tmp_path / "second" / "adapter_model.safetensors").is_file()
