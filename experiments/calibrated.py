"""Skeletons chosen with a few batches of the task, for comparison with those chosen from the weights alone.

``gradient``: matching pursuit over W's own columns and rows on the gradient G of the loss by W. ``activation``: the same on
the spread of the inputs (rows) and of the output gradients (columns), as EVA (arXiv 2410.07170) chooses LoRA's A.
``weighted``: lupp on W scaled by the norms of both, after CURing (arXiv 2501.04211). All reconstructed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pmss.methods.pmss.selection import select_skeleton

RULES = ("gradient", "activation", "weighted")


@dataclass
class Moments:
    """Sums over the tokens of a few batches: of ``g x^T`` [out, in], ``x x^T`` [in, in] and ``g g^T`` [out, out]."""

    gradient: Tensor
    inputs: Tensor
    outputs: Tensor


def calibrate(
    layers: dict[str, nn.Module], embedding: nn.Module, loss: Callable[[Any], Tensor], batches: Iterable[Any]
) -> dict[str, Moments]:
    """Run the batches forward and backward and gather each layer's moments in float32; parameters get no gradients."""
    found: dict[str, Moments] = {}
    kept: dict[str, Tensor] = {}
    handles = [embedding.register_forward_hook(lambda _, __, output: output.requires_grad_())]

    def before(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            kept[name] = inputs[0].detach().flatten(0, -2).float()

        return hook

    def after(name: str) -> Any:
        def hook(_: nn.Module, __: Any, grads: tuple[Tensor, ...]) -> None:
            x, g = kept.pop(name), grads[0].detach().flatten(0, -2).float()
            if name not in found:
                found[name] = Moments(*(x.new_zeros(m, n) for m, n in _shapes(g.shape[1], x.shape[1])))
            for total, (left, right) in zip(vars(found[name]).values(), ((g, x), (x, x), (g, g)), strict=True):
                total.addmm_(left.T, right)

        return hook

    for name, layer in layers.items():
        handles.append(layer.register_forward_pre_hook(before(name)))
        handles.append(layer.register_full_backward_hook(after(name)))
    training = [p for layer in layers.values() for p in layer.parameters() if p.requires_grad]
    for parameter in training:
        parameter.requires_grad_(False)
    try:
        for batch in batches:
            loss(batch).backward()
    finally:
        for parameter in training:
            parameter.requires_grad_(True)
        for handle in handles:
            handle.remove()
    return found


def _shapes(out: int, inp: int) -> tuple[tuple[int, int], ...]:
    return (out, inp), (inp, inp), (out, out)


def choose(weight: Tensor, moments: Moments, rank: int, by: str) -> tuple[Tensor, Tensor]:
    """Rows [rank] and columns [rank] of W [out, in], ascending."""
    weight = weight.detach().float()
    if by == "gradient":
        rows = pursue(weight.T, moments.gradient.T, rank)
        cols = pursue(weight, moments.gradient, rank)
    elif by == "activation":
        rows, cols = (pursue(w, _root(m), rank) for w, m in ((weight.T, moments.inputs), (weight, moments.outputs)))
    elif by == "weighted":
        scaled = moments.outputs.diagonal().sqrt()[:, None] * weight * moments.inputs.diagonal().sqrt()
        rows, cols = select_skeleton(scaled, rank)
    else:
        raise ValueError(f"skeleton rule {by!r} is not known; choose one of {list(RULES)}.")
    return rows.sort().values, cols.sort().values


def _root(moment: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(moment.double())
    return (vectors * values.clamp(min=0).sqrt()).float()


def pursue(vectors: Tensor, target: Tensor, count: int) -> Tensor:
    """Greedily choose ``count`` columns of ``vectors`` [d, n] whose span holds as much of ``target`` [d, m] as it can.

    Orthogonal matching pursuit: each step takes the column whose part outside the span so far holds the most.
    """
    rest = vectors.clone()
    held = rest.T @ target  # [n, m]: what each column, less the span so far, has in common with the target
    squares = rest.square().sum(0)
    floor = squares * 1e-6  # what is left of a column that the span holds already is rounding
    chosen: list[int] = []
    for _ in range(count):
        score = held.square().sum(1) / squares.clamp(min=1e-30)
        score[squares <= floor] = -1.0
        score[chosen] = -2.0
        best = int(score.argmax())
        chosen.append(best)
        direction = rest[:, best] / squares[best].sqrt().clamp(min=1e-15)
        shares = direction @ rest
        held -= shares[:, None] * (direction @ target)
        rest -= direction[:, None] * shares
        squares = rest.square().sum(0)
    return torch.tensor(chosen, device=vectors.device)
