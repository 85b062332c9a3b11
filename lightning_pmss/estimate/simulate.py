"""Simulate one training step on fake tensors, and measure the bytes that are alive during it.

Fake tensors run the operations of the model, its autograd and its activation checkpointing, and are freed as in a real run;
only the values are missing. So the sizes follow from the code that trains, not from a formula of one architecture.
"""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_pmss.estimate.model import Architecture
from lightning_pmss.layers.indices import index_tensors
from lightning_pmss.messages import reason


@dataclass(frozen=True)
class StepBytes:
    """Bytes of a step on one device, without parameters, their gradients and the optimizer.

    Attributes:
        kept: Bytes alive when the forward pass reaches the output head, which the decoder layers keep for the backward pass.
        head: Peak from there to the end of the head's backward pass.
        body: Peak in the rest of the step: forward pass, and backward pass with recomputation.
    """

    kept: int
    head: int
    body: int

    @property
    def peak(self) -> int:
        """Peak of the whole step."""
        return max(self.head, self.body)


class LiveBytes(TorchDispatchMode):
    """Measure the storages that operations allocate, until they are freed; tensors in ``known`` are ignored.

    Attributes:
        now: Bytes alive.
        peak: Maximum of ``now`` since ``peak`` was last set.
    """

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self._seen = {t.untyped_storage()._cdata for t in known}
        self._known = known  # keeps their addresses from being reused
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self._seen:
            return
        self._seen.add(address)
        self.now += size
        self.peak = max(self.peak, self.now)

        def freed() -> None:
            self._seen.discard(address)
            self.now -= size

        weakref.finalize(storage, freed).atexit = False


def simulate_step(
    architecture: Architecture,
    model: nn.Module,
    *,
    micro_batch: int,
    sequence_length: int,
    gradient_checkpointing: bool,
    autocast: torch.dtype | None = None,
) -> StepBytes:
    """Simulate one forward and backward pass of `CausalLMModule`'s loss.

    The batch has padding, so the attention gets a mask, which its kernels expand and keep per layer.

    Args:
        architecture: The builder of the model.
        model: Made by ``architecture``.
        micro_batch: Sequences per device and pass.
        sequence_length: Tokens per sequence: prompt, response and padding.
        gradient_checkpointing: Whether each decoder layer is recomputed in the backward pass (non-reentrant).
        autocast: The lower precision of ``bf16-mixed``; None without autocast.

    Raises:
        ValueError: An operation of the model needs values, or does not support fake tensors of this dtype.
    """
    from lightning_pmss.modules.causal_lm import CausalLMModule

    if gradient_checkpointing:
        # Fake tensors have no random state to save; without dropout it does not matter.
        _checkpointing(model, {"use_reentrant": False, "preserve_rng_state": False})
    module = CausalLMModule("estimate")
    module.model = model
    own = [*model.parameters(), *model.buffers(), *index_tensors(model).values()]
    # Gradients of parameters are dropped here: `place` accounts for them, by strategy.
    hooks: list[Any] = [p.register_post_accumulate_grad_hook(_drop) for p in model.parameters() if p.requires_grad]
    marks: dict[str, int] = {}
    live = LiveBytes(own)

    def head_begins(_: nn.Module, args: tuple[Any, ...]) -> None:
        marks["kept"], marks["body"], live.peak = live.now, live.peak, live.now
        hidden = args[0]
        if hidden.requires_grad:
            hidden.register_hook(head_ends)

    def head_ends(_: Tensor) -> None:
        marks["head"], live.peak = live.peak, live.now

    head = model.get_output_embeddings()  # type: ignore[operator]
    hooks.append(head.register_forward_pre_hook(head_begins))
    shape = micro_batch, sequence_length
    try:
        with architecture.mode:
            batch = {key: torch.zeros(shape, dtype=torch.int64) for key in ("input_ids", "labels")}
            batch["attention_mask"] = torch.ones(shape, dtype=torch.int64)
            with live:
                with nullcontext() if autocast is None else torch.autocast("cpu", autocast):
                    loss, _ = module.response_loss(batch)
                loss.backward()
    except RuntimeError as error:  # an operation that needs values, or that fake tensors do not support
        raise ValueError(
            f"the step of {type(model).__name__} cannot be played through without values"
            f" ({reason(error)}); try --precision bf16-true, which more operations support."
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return StepBytes(marks["kept"], marks.get("head", live.peak), max(marks["body"], live.peak))


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


def _checkpointing(model: Any, options: dict[str, bool]) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)
