"""Tiny bases on disk, and models whose U is random: an untrained U would hide every error of the files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_pmss.conversion.convert import adapted_layers, convert
from lightning_pmss.methods.pmss.config import PMSSConfig

Train = Callable[..., nn.Module]


@pytest.fixture
def train() -> Train:
    """Convert a model and give it a random update of a third of its weights' norm."""

    def trained(model: nn.Module, *, size: float = 0.3, seed: int = 1, **config: Any) -> nn.Module:
        convert(model, PMSSConfig(**{"rank": 6, **config}))
        generator = torch.Generator().manual_seed(seed)
        for layer in adapted_layers(model).values():
            with torch.no_grad():
                layer.core.weight.copy_(torch.randn(layer.core.weight.shape, generator=generator))
                share = size * layer.base_weight().float().norm() / _update(layer).norm()
                layer.core.weight.mul_(share)
        return model

    return trained


def _update(layer: Any) -> torch.Tensor:
    update: torch.Tensor = layer.weight_columns().float() @ layer.core_update().float() @ layer.weight_rows().float()
    return update.detach()


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a random two-layer GPT-2: Conv1D layers, tied head, keys with the prefix ``transformer.``."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=50, n_positions=32, n_embd=24, n_layer=2, n_head=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config)
        for parameter in model.parameters():  # biases that are not zero
            parameter.data.add_(0.02 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("tiny_gpt2")
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def sharded_llama(tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny LLaMA in bfloat16 and in several shards."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("sharded_llama")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="20KB")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    assert len(list(Path(folder).glob("*.safetensors"))) > 2
    return str(folder)


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Four architectures, random, with biases that are not zero; Phi-3's queries, keys and values are one layer."""
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        Phi3Config,
        Phi3ForCausalLM,
    )

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        models: dict[str, Any] = {
            "llama": LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, attention_bias=True, mlp_bias=True, tie_word_embeddings=False,
                )
            ),
            "gpt2": GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=32, n_embd=24, n_layer=2, n_head=2)),
            "bert": BertForSequenceClassification(
                BertConfig(
                    vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                    num_labels=3,
                )
            ),
            "phi3": Phi3ForCausalLM(
                Phi3Config(
                    vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, pad_token_id=0, tie_word_embeddings=False,
                )
            ),
        }  # fmt: skip
        folders = {}
        for name, model in models.items():
            for parameter in model.parameters():
                parameter.data.add_(0.05 * torch.randn_like(parameter))
            folders[name] = tmp_path_factory.mktemp(name)
            model.save_pretrained(folders[name])
    return folders


@pytest.fixture
def logits() -> Callable[[nn.Module], torch.Tensor]:
    def compute(model: nn.Module) -> torch.Tensor:
        model.eval()
        with torch.no_grad():
            return model(input_ids=torch.arange(1, 11).reshape(1, 10)).logits.float()  # type: ignore[no-any-return]

    return compute
