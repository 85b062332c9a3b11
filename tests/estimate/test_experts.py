"""The estimate of a mixture of experts against what a real step keeps and takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_pmss import AdapterConfig, LoRAConfig, MiSSConfig, PMSSConfig, convert
from lightning_pmss.estimate import Run, estimate
from tests.estimate.small import BATCH, LENGTH, SIZES, allocator_peak, forward_backward, kept_at_the_head, loss_of, near

CONFIGS = {
    "pmss": PMSSConfig(rank=48, selection="norm"),
    "one-sided": PMSSConfig(columns="all", rank=8, selection="norm"),
    "lora": LoRAConfig(rank=16),
    "miss": MiSSConfig(rank=32),
}


def mixture() -> Any:
    """Qwen3-MoE with the proportions of a real one: an expert's inner side is 3/8 of the width, an eighth of them active."""
    from transformers import Qwen3MoeConfig

    experts = {"moe_intermediate_size": 96, "num_experts": 16, "num_experts_per_tok": 2, "head_dim": 32}
    return Qwen3MoeConfig(**SIZES | experts)


def real_model(config: AdapterConfig, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(mixture(), dtype=dtype)
    convert(model, config)
    return model.train()


@pytest.mark.parametrize(
    ("method", "dtype"),
    [("pmss", torch.bfloat16), ("one-sided", torch.float32), ("lora", torch.bfloat16), ("miss", torch.float32)],
)
def test_bytes_kept_and_peak_of_a_step(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    mixture().save_pretrained(tmp_path)
    precision = "bf16-true" if dtype is torch.bfloat16 else "32-true"
    name = str(dtype).removeprefix("torch.")
    asked = Run(
        str(tmp_path), config=CONFIGS[method], micro_batch=BATCH, sequence_length=LENGTH, precision=precision,
        weights_dtype=name, gradient_checkpointing=False,
    )  # fmt: skip
    (result,) = estimate(asked, (CONFIGS[method].method,), both=False).methods.values()
    model = real_model(CONFIGS[method], dtype)
    loss, trained = loss_of(model), [p for p in model.parameters() if p.requires_grad]
    forward_backward(loss)()  # caches are filled, and gradients are there, as in an accumulation window
    gradients = sum(p.nbytes for p in trained)
    peak = gradients + allocator_peak(forward_backward(loss))
    measured = {"kept": kept_at_the_head(model, loss), "peak": peak, "held": sum(p.nbytes for p in model.parameters())}
    step = result.activations + result.logits + result.work
    held = result.base + result.trained + result.factors
    report = near(measured, {"kept": result.activations, "peak": step + result.gradients, "held": held})
    assert not [line for line in report if "OFF" in line], report
