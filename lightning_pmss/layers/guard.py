"""States of a model in which something would go wrong silently: refused with the remedy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class _Refusing(torch.autograd.Function):
    """The identity, whose backward pass says what is wrong."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, trained: Tensor) -> Tensor:
        ctx.mark_dirty(output)  # not a view: an in-place activation may follow
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        raise RuntimeError(
            "the model is merged, so U has no effect and cannot be trained. Call unmerge(model) before training; to compute "
            "gradients of the merged model for another purpose, call model.eval()."
        )


def refuse_training(layer: torch.nn.Module, output: Tensor, trained: Tensor) -> Tensor:
    """The output of a merged layer; in training mode, one that a backward pass cannot go through.

    Without this a loop of one's own ends in torch's "element 0 of tensors does not require grad", or, where ``also_train``
    modules or embeddings train as well, silently trains those alone.
    """
    if not (layer.training and torch.is_grad_enabled() and trained.requires_grad):
        return output
    refusing: Tensor = _Refusing.apply(output, trained)  # type: ignore[no-untyped-call]
    return refusing


def refuse_disabled(modules: Iterable[torch.nn.Module], done: str) -> None:
    """Inside `disable_adapter` the live tensors of modules trained in full are the base's, and layers leave their U out.

    Args:
        modules: Of the model.
        done: What cannot be done to an adapter then, as a participle.

    Raises:
        ValueError: The adapter of one of them is disabled.
    """
    if any(getattr(module, "disabled", False) is True for module in modules):
        raise ValueError(f"inside `with disable_adapter(model)` no adapter can be {done}; leave the block first.")
