"""An upcycled mixture computes what the dense model does, and its experts can be trained apart."""

from __future__ import annotations

import pytest
import torch

from examples.upcycle import upcycled
from lightning_pmss import PMSSConfig, convert


def small_llama(**options: object) -> object:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes, **options))


@pytest.mark.parametrize("tied", [False, True])
def test_the_mixture_equals_the_dense_model(tied: bool) -> None:
    dense = small_llama(tie_word_embeddings=tied)
    mixture = upcycled(dense, experts=3, active=2)
    tokens = torch.randint(0, 64, (2, 9))
    torch.testing.assert_close(mixture(tokens).logits, dense(tokens).logits, rtol=1e-4, atol=1e-5)  # type: ignore[operator]
    report = convert(mixture, PMSSConfig(rank=8))
    assert sum("experts" in layer.name for layer in report.layers) == 2 * 2 * 3


def test_what_cannot_be_upcycled_is_refused() -> None:
    with pytest.raises(ValueError, match="a llama model cannot be upcycled here; give a LLaMA without biases"):
        upcycled(small_llama(mlp_bias=True), experts=4, active=2)
    with pytest.raises(ValueError, match="--active 5: a token can have 1 to 4 of 4 experts"):
        upcycled(small_llama(), experts=4, active=5)
