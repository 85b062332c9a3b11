"""Combine named adapters: their weighted sum becomes a new adapter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from lightning_pmss.conversion.convert import adapted_layers
from lightning_pmss.layers.adapted import AdaptedLinear
from lightning_pmss.layers.convertible import canonical_shape
from lightning_pmss.layers.guard import refuse_disabled
from lightning_pmss.messages import some
from lightning_pmss.methods.method import Update
from lightning_pmss.named.bank import NamedAdapter, bank_of, different, refuse_unknown, refuse_used, take


@dataclass(frozen=True)
class Combination:
    """Report of `combine_adapters`, to ``print``.

    Attributes:
        name: Name of the new adapter.
        weights: Factors of the adapters in the sum.
        agreeing: Layers whose sum has the adapters' own rank: of PMSS those with the same rows and columns.
        joined: The other layers, with the rank that represents the sum exactly.
    """

    name: str
    weights: dict[str, float]
    agreeing: list[str] = field(default_factory=list)
    joined: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        terms = " + ".join(f"{weight:g} {name}" for name, weight in self.weights.items())
        text = f"{self.name} = {terms}: {len(self.agreeing)} layers added at their own rank"
        if self.joined:
            text += f"; {len(self.joined)} joined to rank {max(self.joined.values())} at most"
        return text


@torch.no_grad()
def combine_adapters(model: nn.Module, name: str, weights: Mapping[str, float]) -> Combination:
    """Make a new adapter whose update is exactly the weighted sum of other adapters' updates.

    The U's are added where rows and columns agree. Where they differ, the sum has the union of them, whose rank can be the
    sum of the ranks and must fit the converted layers (``rank=`` of `load_adapters` makes them larger). The new adapter is not
    made active.

    Args:
        model: Converted by `load_adapters`.
        name: Name of the new adapter.
        weights: Factor of each adapter, by name; negative ones are allowed.

    Raises:
        ValueError: A name in use or unknown, no weights or weights that are not finite, modules trained in full, which have no
            meaningful sum, or a union whose rank is too large.
    """
    bank = bank_of(model)
    refuse_used(bank, name)
    if not weights or not all(math.isfinite(weight) for weight in weights.values()):
        raise ValueError(
            f"weights={dict(weights)!r}: give one finite number per adapter, such as {{'a': 0.5, 'b': 0.5}}."
        )
    for part in weights:
        refuse_unknown(bank, part)
    if full := [part for part in weights if bank.adapters[part].extra]:
        raise ValueError(f"{some(full)} have modules trained in full, of which a weighted sum means nothing.")
    first, *others = weights
    for part in others:
        if differ := different(bank.adapters[first].fresh, bank.adapters[part].fresh):
            raise ValueError(
                f"{first!r} and {part!r} were trained with different values of {some(differ)}, so they have no sum."
            )
    refuse_disabled(adapted_layers(model).values(), "set or combined")
    take(model, bank)
    layers = adapted_layers(model)
    done = Combination(name, {part: float(weight) for part, weight in weights.items()})
    sums: dict[str, Update] = {}
    for layer_name, layer in layers.items():
        owners = {
            part: bank.adapters[part].layers[layer_name] for part in weights if layer_name in bank.adapters[part].layers
        }
        parts = {part: layer.method.update_of(state, layer.scale).trimmed() for part, state in owners.items()}
        if not parts:
            continue
        total = layer.method.update_class.weighted([(done.weights[part], update) for part, update in parts.items()])
        total = total.narrowed(canonical_shape(layer))
        sums[layer_name] = total
        if all(update.ranks == total.ranks for update in parts.values()):
            done.agreeing.append(layer_name)
        else:
            done.joined[layer_name] = total.width
    if narrow := [n for n, size in done.joined.items() if size > layers[n].rank]:
        raise ValueError(_too_wide(list(weights), {n: done.joined[n] for n in narrow}, layers))
    states = {
        n: layers[n].method.fitted(layers[n].base_weight(), update, layers[n].rank, layers[n].scale, n)
        for n, update in sums.items()
    }
    bank.adapters[name] = NamedAdapter(states, {}, dict(bank.adapters[first].fresh))
    return done


def _too_wide(adapters: Sequence[str], sizes: Mapping[str, int], layers: Mapping[str, AdaptedLinear]) -> str:
    most = max(sizes.values())
    text = (
        f"the sum of {some(list(adapters))} has rank {most} in {some(list(sizes))}, more than these layers have here."
    )
    if any(size > layers[n].method.rank_of(canonical_shape(layers[n]), size) for n, size in sizes.items()):
        return f"{text} No layer of these shapes can have it. Combine their folders: combine_files(..., rule='svd', rank=...)."
    text += f" Load them by load_adapters(model, ..., rank={most})"
    skeletons = any(layers[n].indices() for n in sizes)
    return f"{text}, or train them on one skeleton (skeleton_file=)." if skeletons else f"{text}."
