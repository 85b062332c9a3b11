"""Small mixtures of experts of the architectures that the tests go through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from lightning_pmss.conversion.convert import adapted_layers

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
_DEEPSEEK: dict[str, Any] = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 1,
    "n_group": 1, "topk_group": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "num_key_value_heads": 4,
}  # fmt: skip
RANDOM = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias", "gate.weight", "router.weight")
MIXTURES: dict[str, Callable[..., nn.Module]] = {
    "mixtral": lambda **more: MixtralForCausalLM(MixtralConfig(**{"num_local_experts": 4} | SIZES | more)),
    "qwen3_moe": lambda **more: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24} | SIZES | more)
    ),
    "gpt_oss": lambda **more: GptOssForCausalLM(
        GptOssConfig(**{"num_local_experts": 4, "num_experts_per_tok": 2} | SIZES | more)
    ),
    "deepseek": lambda **more: DeepseekV3ForCausalLM(DeepseekV3Config(**SIZES | _DEEPSEEK | more)),
}


def mixture(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **options: Any) -> Any:
    """A model whose experts, biases and routers are not zero; `options` are the config's."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = MIXTURES[name](**options)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(RANDOM):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.to(dtype)


def tokens(batch: int = 2, length: int = 11) -> Tensor:
    """The same in every test."""
    return torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(5))


def train(model: nn.Module, seed: int = 1, size: float = 0.3) -> Any:
    """Give every layer an update that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            for tensor in layer.core.trained().values():
                value = torch.randn(tensor.shape, generator=generator) * size / tensor.shape[-1] ** 0.5
                tensor.copy_(value)
    return model


def experts_of(model: nn.Module) -> list[tuple[str, Any]]:
    """(name, module) of the modules that keep experts."""
    return [(name, m) for name, m in model.named_modules() if name.endswith(".experts")]
