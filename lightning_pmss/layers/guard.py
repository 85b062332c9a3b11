"""Refuse states of a model in which something would go wrong silently, and say the remedy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class _Refusing(torch.autograd.Function):
    """The identity; its backward pass raises an error."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, trained: Tensor, name: str) -> Tensor:
        ctx.name = name
        ctx.mark_dirty(output)  # not a view: an in-place activation may follow
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        raise RuntimeError(
            f"the model is merged, so {ctx.name} has no effect and cannot be trained. Call unmerge(model) before training; to"
            " compute gradients of the merged model for another purpose, call model.eval()."
        )


def refuse_training(layer: torch.nn.Module, output: Tensor, trained: Tensor, name: str) -> Tensor:
    """Refuse to backpropagate through a merged layer: its adapter does not reach the output and would silently not learn.

    Args:
        layer: The merged layer.
        output: Of it.
        trained: One of its trained tensors.
        name: What is trained, for the message.

    Returns:
        The output; in training mode its backward pass raises. Without it a hand-written loop would end in torch's "element 0
        of tensors does not require grad", or silently train only the modules of ``also_train``.
    """
    if not (layer.training and torch.is_grad_enabled() and trained.requires_grad):
        return output
    refusing: Tensor = _Refusing.apply(output, trained, name)  # type: ignore[no-untyped-call]
    return refusing


def refuse_disabled(modules: Iterable[torch.nn.Module], done: str) -> None:
    """Refuse to touch adapters inside `disable_adapter`, where modules trained in full have the base's tensors.

    Args:
        modules: Of the model.
        done: The refused operation, as a participle ("saved").

    Raises:
        ValueError: The adapter of one of them is disabled.
    """
    if any(getattr(module, "disabled", False) is True for module in modules):
        raise ValueError(f"inside `with disable_adapter(model)` no adapter can be {done}; leave the block first.")
