"""Compute the cross entropy in chunks of the positions with a label, without the logits of a whole batch.

The logits ``[B, T, vocabulary]``, their float32 copies and their gradients need most of the memory in long batches of a small
model. Here those of one chunk exist at a time.

The model's own forward runs, with another forward for its head. So FSDP and ZeRO-3 gather modules as always, and a head that is
converted, tied or quantised is called, never taken apart. The head returns losses in place of logits, so the gradient flows
through the model's output, as every engine expects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

Product = Callable[[Tensor, Tensor], Tensor]
"""``(hidden [n, H], targets [n]) -> losses [n]``."""

# Wrappers whose own forward gathers, recomputes or compiles: it must stay, and the forward inside be replaced.
_WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")
# Settings of a configuration that change logits behind the head.
_AFTER_THE_HEAD = ("final_logit_softcapping", "logits_soft_cap")


def check_chunk(chunk: int | None) -> None:
    """Raise `ValueError` unless it is None or a number of tokens."""
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
        raise ValueError(
            f"loss_chunk={chunk!r} is the number of tokens whose logits exist at a time; type a whole number of at least 1, "
            "such as 1024, or leave it out for those of the whole batch."
        )


def check_model(model: Any) -> None:
    """Refuse, before any work, a model whose losses cannot be computed in its head.

    Changes that the configuration does not show are detected at the first batch: see `chunked_losses`.

    Raises:
        ValueError: The model has no output head, or is known to change its head's output.
    """
    _head(model)
    config = model.config.get_text_config()
    for name in _AFTER_THE_HEAD:
        if getattr(config, name, None):
            raise _refusal(model, f"changes what its head returns ({name} = {getattr(config, name)})")


def chunked_losses(run: Callable[[], Tensor], model: Any, labels: Tensor, ignored: int, chunk: int) -> Tensor:
    """Compute the cross entropy of each position, as from the logits that `run` would return.

    If nothing in the head is trained, the gradient of its input is computed together with the losses, from the same logits;
    else the head is computed a second time in the backward pass. There is no second derivative.

    Args:
        run: Calls the model once and returns its logits.
        model: The model that it calls, of transformers.
        labels: int64 [B, T], shifted already: the token that position t is to predict.
        ignored: The label of positions without loss.
        chunk: Positions whose logits exist at a time.

    Returns:
        float32 [B, T] (float64 for a float64 model), 0 where ignored.

    Raises:
        ValueError: The model has no output head, does not call it once on all positions, or changes what it returns.
    """
    vocabulary = model.config.get_text_config().vocab_size
    with _losses_in_place_of_logits(_head(model), labels, ignored, chunk) as calls:
        result = run()
    if len(calls) != 1 or calls[0].losses is None:
        raise _refusal(model, "does not call its head once, on every position of the batch")
    if calls[0].width != vocabulary:
        raise _refusal(model, f"has a vocabulary of {vocabulary}, and a head that returns {calls[0].width} numbers")
    # Engines may hand the same values on in another tensor.
    if result is not calls[0].losses and not torch.equal(result, calls[0].losses):
        raise _refusal(model, "changes what its head returns (by a factor, say)")
    return result.squeeze(-1)


@dataclass
class _Call:
    """Result of one call of the head: losses [B, T, 1], from logits of this width."""

    losses: Tensor | None = None
    width: int = 0


@contextmanager
def _losses_in_place_of_logits(head: nn.Module, labels: Tensor, ignored: int, chunk: int) -> Iterator[list[_Call]]:
    """Make the head return losses inside the block; yield its calls."""
    original, own = head.forward, head.__dict__.get("forward")
    calls: list[_Call] = []

    def losses_of(hidden: Tensor, targets: Tensor) -> Tensor:
        logits: Tensor = original(hidden)
        calls[-1].width = logits.shape[-1]
        return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), targets, reduction="none")

    def forward(hidden: Tensor) -> Tensor:
        calls.append(_Call())
        if hidden.shape[:-1] != labels.shape:
            return hidden[..., :1]  # refused as soon as the model returns
        flat, targets = hidden.flatten(0, 1), labels.flatten()
        places = (targets != ignored).nonzero().squeeze(1)
        compute = _way(flat, original, losses_of)
        # Without any label there is one empty chunk, so that the graph, and the engines' hooks on it, stay the same.
        found = torch.cat([compute(flat[part], targets[part]) for part in places.split(chunk)])
        spread = found.new_zeros(len(targets)).index_put((places,), found)
        calls[-1].losses = spread.view(*labels.shape, 1)
        return calls[-1].losses

    head.forward = forward  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        if own is None:
            del head.__dict__["forward"]
        else:  # an engine had put its own there
            head.forward = own  # type: ignore[method-assign]


def _way(flat: Tensor, head: Callable[[Tensor], Tensor], losses_of: Product) -> Product:
    """Choose how to compute the losses of a chunk: without gradient, with that of their input at once, or twice."""
    if not torch.is_grad_enabled():
        return losses_of
    # Derived from the head's output, since engines hide parameters: FSDP1 shows none after flattening them.
    if head(flat[:1].detach()).requires_grad:
        return partial(checkpoint, losses_of, use_reentrant=False)
    return lambda hidden, targets: _WithGradient.apply(hidden, targets, losses_of)


class _WithGradient(torch.autograd.Function):
    """Losses of positions that do not depend on one another, and the gradient of each position's loss."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, losses_of: Product) -> Tensor:
        with torch.enable_grad():
            leaf = hidden.detach().requires_grad_()
            losses = losses_of(leaf, targets)
            (gradient,) = torch.autograd.grad(losses.sum(), leaf)
        ctx.save_for_backward(gradient)
        return losses.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad.unsqueeze(1).to(gradient.dtype), None, None


def _head(model: Any) -> nn.Module:
    """The module whose forward multiplies by the head's weight, inside its wrappers."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(head, nn.Module):
        raise _refusal(model, "has no output head (get_output_embeddings)")
    while (name := next((n for n in _WRAPPERS if isinstance(getattr(head, n, None), nn.Module)), None)) is not None:
        head = getattr(head, name)
    return head


def _refusal(model: Any, reason: str) -> ValueError:
    return ValueError(
        f"{type(model).__name__} {reason}, so its loss cannot be computed in chunks. Leave --model.loss_chunk out; a smaller "
        "--data.batch_size needs less memory, too."
    )
