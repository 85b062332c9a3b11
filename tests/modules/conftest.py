"""Settings of these tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def trainer(tmp_path: Any) -> Callable[..., L.Trainer]:
    """Makes a quiet CPU Trainer that writes below tmp_path."""

    def make(**options: Any) -> L.Trainer:
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        base = {"accelerator": "cpu", "devices": 1, "logger": False, "default_root_dir": tmp_path, "max_epochs": 1}
        return L.Trainer(**{**base, **quiet, **options})

    return make


@pytest.fixture(scope="session")
def tiny_gpt2(tiny_tokenizer: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a random one-layer GPT-2 that computes in float64 throughout, as LLaMA's norms do not."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer)
    sizes = {"vocab_size": len(tokenizer), "n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2}
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(**sizes, **still, bos_token_id=0, eos_token_id=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config)
    folder = tmp_path_factory.mktemp("tiny_gpt2")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
