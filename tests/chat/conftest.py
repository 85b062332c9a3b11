"""Adapters of the tiny LLaMA that change what it says, and what plain transformers says with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_pmss import PMSSConfig, convert, load_adapter, save_adapter
from lightning_pmss.conversion.convert import adapted_layers

Answer = Callable[..., str]


@pytest.fixture(scope="session")
def adapters(tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    from transformers import AutoModelForCausalLM

    found = {}
    for seed, name in enumerate(("red", "blue")):
        model = AutoModelForCausalLM.from_pretrained(tiny_llama)
        convert(model, PMSSConfig(rank=6, seed=seed))
        generator = torch.Generator().manual_seed(seed)
        for layer in adapted_layers(model).values():
            for value in layer.core.trained().values():
                value.data.copy_(3 * torch.randn(value.shape, generator=generator))
        found[name] = str(save_adapter(model, tmp_path_factory.mktemp("adapters") / name))
    return found


@pytest.fixture(scope="session")
def plainly(tiny_llama: str) -> Answer:
    """The greedy answer to a conversation by transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def answer(messages: Sequence[dict[str, str]], adapter: str | None = None, tokens: int = 8, **options: Any) -> str:
        tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
        model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
        if adapter is not None:
            load_adapter(model, adapter)
        ids = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        said = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
        )
        return tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True).strip()

    return answer


@pytest.fixture
def without_template(tiny_llama: str, tmp_path: Path) -> str:
    """Folder of the same model, as a base: its tokenizer has no chat template, and a beginning of the text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "base"
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = None
    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
