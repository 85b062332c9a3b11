"""A training step and the bytes that it keeps, of adapters on the experts of a two-layer mixture, beside peft's.

    python -m benchmarks.experts --json benchmarks/results/experts.json

The layers are Qwen3-MoE's with 32 experts, of which each token asks four; attention and router are frozen and have no adapter.
All methods train about as many numbers. Times are of the process's CPU time, since other processes may share the cores.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.kept import kept_bytes
from benchmarks.measure import interleaved, spread, table, write_result
from lightning_pmss import AdapterConfig, LoRAConfig, MiSSConfig, PMSSConfig, convert

EXPERTS = {"target_modules": [], "target_parameters": ["gate_up_proj", "down_proj"]}
CONFIGS: dict[str, Callable[..., AdapterConfig]] = {
    "PMSS, all columns": lambda: PMSSConfig(columns="all", rank=14, selection="random", **EXPERTS),
    "PMSS": lambda: PMSSConfig(rank=160, selection="random", **EXPERTS),
    "MiSS": lambda: MiSSConfig(rank=14, **EXPERTS),
    "LoRA": lambda: LoRAConfig(rank=8, **EXPERTS),
}


def mixture(hidden: int, inner: int, experts: int, layers: int) -> Any:
    """Frozen decoder layers of one storage for all methods; the head and the embedding are small."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=hidden, moe_intermediate_size=inner, num_experts=experts, num_experts_per_tok=4,
        num_hidden_layers=layers, num_attention_heads=16, num_key_value_heads=4, head_dim=hidden // 16,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).requires_grad_(False).train()
    for name, parameter in model.named_parameters():
        if name.endswith(("gate_up_proj", "down_proj", "gate.weight")):
            nn.init.normal_(parameter, std=0.02)
    return model


def rivals(base: Any) -> dict[str, Any]:
    """The base, our methods and peft's LoRA, on the same weights."""
    memo = {id(p): p for p in base.parameters()}
    found: dict[str, Any] = {"no adapter": base}
    for name, make in CONFIGS.items():
        found[name] = copy.deepcopy(base, dict(memo))
        convert(found[name], make())
    import peft

    config = peft.LoraConfig(r=8, lora_alpha=16, **EXPERTS)  # type: ignore[arg-type]
    found["LoRA of peft"] = peft.get_peft_model(copy.deepcopy(base, dict(memo)), config)
    return found


def step(model: Any, x: Tensor) -> None:
    """One forward and backward pass to the embeddings."""
    model(inputs_embeds=x).logits.square().mean().backward()
    x.grad = None
    for parameter in model.parameters():
        parameter.grad = None


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print, write."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", help="write the figures here")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=768)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    models = rivals(mixture(options.hidden, options.inner, options.experts, options.layers))
    x = torch.randn(1, options.tokens, options.hidden, requires_grad=True)
    keeps = {name: kept_bytes(model, lambda model=model: model(inputs_embeds=x)) for name, model in models.items()}  # type: ignore[misc]
    runs: dict[str, Callable[[], object]] = {n: lambda model=m: step(model, x) for n, m in models.items()}  # type: ignore[misc]
    found = interleaved(runs, options.repeats, clock=time.process_time)
    trained = {n: sum(p.numel() for p in m.parameters() if p.requires_grad) for n, m in models.items()}
    rows = [
        (
            name,
            trained[name],
            spread(found[name])["median"],
            keeps[name] / 2**20,
            (keeps[name] - keeps["no adapter"]) / 2**20,
        )
        for name in models
    ]
    print(table(("experts", "trained", "step, s of CPU time", "kept, MiB", "more than the base, MiB"), rows))
    figures = {"seconds": {n: spread(t) for n, t in found.items()}, "kept_bytes": keeps, "trained": trained}
    shape = {n: getattr(options, n) for n in ("hidden", "inner", "experts", "layers", "tokens")}
    return write_result(options.json, "experts", shape | figures)


if __name__ == "__main__":
    main()
