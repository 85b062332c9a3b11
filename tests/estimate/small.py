"""The small LLaMA of the measurements, and what a real process holds and keeps."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pmss import AdapterConfig, PMSSConfig, convert
from lightning_pmss.layers.indices import index_tensors
from lightning_pmss.modules.causal_lm import IGNORED, CausalLMModule

SIZES = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
BATCH, LENGTH, RANK = 2, 192, 64


def small_config() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**SIZES)


def write_config(folder: Path) -> str:
    small_config().save_pretrained(folder)
    return str(folder)


def small_model(dtype: torch.dtype, config: AdapterConfig | None) -> nn.Module:
    """In train mode, converted where there is a config; selection by norm, which needs no time."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(small_config(), dtype=dtype)
    if config is not None:
        convert(model, config)
    return model.train()


def pmss_config(**options: Any) -> PMSSConfig:
    return PMSSConfig(**{"rank": RANK, "selection": "norm"} | options)


def small_batch() -> dict[str, Tensor]:
    """Right padded, as batches are: the attention gets a mask."""
    ids = torch.randint(0, SIZES["vocab_size"], (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, LENGTH // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORED)}


def loss_of(model: nn.Module) -> Callable[[], Tensor]:
    module = CausalLMModule("small")
    module.model = model
    batch = {name: tensor.to(next(model.parameters()).device) for name, tensor in small_batch().items()}
    return lambda: module.response_loss(dict(batch))[0]


def checkpoint_activations(model: Any) -> None:
    model.activation_checkpointing_enable({"use_reentrant": False})


def kept_at_the_head(model: Any, loss: Callable[[], Tensor]) -> int:
    """Bytes saved for the backward pass when the head is reached, one storage each, without parameters and buffers.

    What checkpointing holds it holds beside these hooks, so this is for a pass without.
    """
    kept: dict[int, tuple[Tensor, int]] = {}
    found: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        # Asked each time: a sharding engine puts the whole parameter into the module only while it is needed.
        held = *model.parameters(), *model.buffers(), *index_tensors(model).values()
        own = {local(t).untyped_storage()._cdata for t in held}
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = tensor, storage.nbytes()  # held, so that no address comes twice
        return tensor

    def at_head(*_: Any) -> None:
        found.append(sum(size for _, size in kept.values()))

    hook = model.get_output_embeddings().register_forward_pre_hook(at_head)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss().backward()
    hook.remove()
    return found[0]


def allocator_peak(step: Callable[[], Any]) -> int:
    """The most bytes that PyTorch's CPU allocator gave out at once during ``step``, above those at its start."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def forward_backward(loss: Callable[[], Tensor], parameters: Any = ()) -> Callable[[], None]:
    def step() -> None:
        loss().backward()
        for parameter in parameters:
            parameter.grad = None

    return step


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the optimizer's states on this process, without its step counters."""
    tensors = (v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor))
    return sum(local(t).nbytes for t in tensors if t.dim() > 0)


def local(tensor: Any) -> Tensor:
    """This process's part, padding included."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def near(measured: Mapping[str, int], estimated: Mapping[str, int], within: float = 0.1) -> list[str]:
    """One line per figure; those off by more than ``within`` say so."""
    lines = []
    for name, size in measured.items():
        off = estimated[name] / size - 1 if size else float(estimated[name] > 0)
        lines.append(
            f"{name}: measured {size}, estimated {estimated[name]}, {off:+.2%}{' OFF' if abs(off) > within else ''}"
        )
    return lines
