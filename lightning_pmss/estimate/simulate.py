"""One training step on fake tensors, and the bytes that are alive during it.

Fake tensors run the very operations of the model, its autograd and its activation checkpointing, and free what a real run
would free; only nobody computes. So the count follows from the code that trains, not from a formula of one architecture.
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
    """Bytes on one device beside parameters, gradients of parameters and optimizer.

    Attributes:
        kept: Alive when the forward pass reaches the output head: what the decoder layers keep for the backward pass.
        head: The most alive between there and the end of the head's backward pass.
        body: The most alive at any other time: forward pass, and backward pass with what it recomputes.
    """

    kept: int
    head: int
    body: int

    @property
    def peak(self) -> int:
        """The most alive at any time."""
        return max(self.head, self.body)


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make, until they are freed; those in ``known`` are not counted.

    Attributes:
        now: Bytes alive.
        peak: The most since it was last set.
    """

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self._seen = {t.untyped_storage()._cdata for t in known}
        self._known = known  # held, so that no address is used a second time
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
    """Play one forward and backward pass of `CausalLMModule`'s loss through.

    The batch has padding, as batches have: the attention gets a mask, which its kernels expand and keep per layer.

    Args:
        architecture: The model's.
        model: Made by ``architecture``.
        micro_batch: Sequences per device and pass.
        sequence_length: Tokens per sequence, prompt, response and padding.
        gradient_checkpointing: Whether each decoder layer is computed again in the backward pass (non-reentrant).
        autocast: The lower precision of ``bf16-mixed``; None without.

    Raises:
        ValueError: The model computes something that needs values, or that has no fake form in this dtype.
    """
    from lightning_pmss.modules.causal_lm import CausalLMModule

    if gradient_checkpointing:
        # Random states cannot be saved where there are no values; without dropout they change nothing in the count.
        _checkpointing(model, {"use_reentrant": False, "preserve_rng_state": False})
    module = CausalLMModule("estimate")
    module.model = model
    own = [*model.parameters(), *model.buffers(), *index_tensors(model).values()]
    # A gradient of a parameter goes to the gradients' column: the strategy decides where it is and how long.
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
    except RuntimeError as error:  # an operation that looks at values, or that PyTorch has no shapes for
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
