"""The named adapters of a model: which there are, which one is live, and how one takes another's place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_pmss.conversion.convert import adapted_layers, conversion_of
from lightning_pmss.conversion.roots import adapted_root, canonical_modules
from lightning_pmss.files.adapter import tensors_of
from lightning_pmss.files.adapter_file import FreshTensor
from lightning_pmss.files.fresh import live_tensors, new_rows
from lightning_pmss.layers.adapted import AdaptedLinear
from lightning_pmss.layers.parts import is_sharded
from lightning_pmss.messages import some

_ATTRIBUTE = "pmss_adapters"


@dataclass
class NamedAdapter:
    """One adapter.

    Attributes:
        layers: Of each layer it has, the trained, frozen and index tensors, in the rank of the live layer.
        extra: The tensors of the modules it trains in full.
        fresh: Those that it was trained beside and that no file of the base holds.
    """

    layers: dict[str, dict[str, Tensor]]
    extra: dict[str, Tensor]
    fresh: dict[str, FreshTensor] = field(default_factory=dict)


@dataclass
class Bank:
    """All of them.

    Attributes:
        adapters: By name.
        base: What the modules trained in full were before.
        active: The name of the live one.
    """

    adapters: dict[str, NamedAdapter]
    base: dict[str, Tensor]
    active: str


def attach(model: nn.Module, bank: Bank) -> None:
    """Keep the bank with the model."""
    setattr(adapted_root(model)[0], _ATTRIBUTE, bank)


def find_bank(model: nn.Module) -> Bank | None:
    """The model's bank, if it has one."""
    found: Bank | None = getattr(adapted_root(model)[0], _ATTRIBUTE, None)
    return found


def bank_of(model: nn.Module) -> Bank:
    """The model's bank.

    Raises:
        ValueError: It has none, or is sharded.
    """
    if is_sharded(model):
        raise ValueError("a sharded model holds one adapter; several are for one device or DDP.")
    if (bank := find_bank(model)) is None:
        raise ValueError(
            f"{type(model).__name__} has no named adapters: load_adapters(model, {{'name': folder, ...}}) comes first."
        )
    return bank


@torch.no_grad()
def take(model: nn.Module, bank: Bank) -> None:
    """Keep the live values under the active adapter's name: they may have been trained."""
    active = bank.adapters[bank.active]
    for name, layer in adapted_layers(model).items():
        if name in active.layers or has_update(layer):  # else a layer that this adapter does not have
            active.layers[name] = {n: t.detach().clone() for n, t in layer.tensors().items()}
    live = places(model)
    for key, value in bank.base.items():
        if key in active.extra or not torch.equal(live[key], value):
            active.extra[key] = live[key].detach().clone()


@torch.no_grad()
def put(model: nn.Module, bank: Bank, name: str) -> None:
    """Copy an adapter into the live layers and modules."""
    adapter = bank.adapters[name]
    for layer_name, layer in adapted_layers(model).items():
        state = adapter.layers.get(layer_name)
        if state is None:
            for trained in layer.core.trained().values():
                trained.zero_()
        else:
            for index_name, index in layer.indices().items():
                index.copy_(state[index_name])
            layer.core.set_frozen(state)
            layer.set_numbers(state)
        layer.fingerprint = None  # of other rows and columns; taken anew where it is needed
    fill(places(model), bank.base | adapter.extra)
    fill_fresh(model, adapter.fresh)
    bank.active = name


def has_update(layer: AdaptedLinear) -> bool:
    """Whether every number of the layer's update is there: one factor that is zero makes it nothing."""
    return all(bool(value.any()) for value in layer.update().numbers().values())


def places(model: nn.Module) -> dict[str, Tensor]:
    """The live tensors of the modules trained in full."""
    report = conversion_of(model)
    assert report is not None
    return tensors_of(report.also_train, canonical_modules(model))


@torch.no_grad()
def fill(places: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy values into the tensors of the same names."""
    for key, place in places.items():
        if key in values:
            place.copy_(values[key])


@torch.no_grad()
def fill_fresh(model: nn.Module, fresh: Mapping[str, FreshTensor], at: str | None = None) -> None:
    """Copy what an adapter was trained beside into the model; the base has nothing of it, so it stays until another comes.

    at: See `fresh_tensors`.
    """
    for key, place in new_rows(live_tensors(model, fresh, at), fresh).items():
        place.copy_(fresh[key].value)


def different(one: Mapping[str, FreshTensor], other: Mapping[str, FreshTensor]) -> list[str]:
    """Names of what two adapters were trained beside with different values."""
    both = one.keys() | other.keys()
    return [n for n in sorted(both) if n not in one or n not in other or not torch.equal(one[n].value, other[n].value)]


def refuse_unknown(bank: Bank, name: str) -> None:
    """Name what there is."""
    if name not in bank.adapters:
        raise ValueError(f"no adapter is called {name!r}; there are {some(list(bank.adapters))}.")


def refuse_used(bank: Bank, name: str) -> None:
    """A name is given once."""
    if name in bank.adapters:
        raise ValueError(
            f"an adapter is called {name!r} already; delete_adapter(model, {name!r}) or take another name."
        )


def refuse_merged(model: nn.Module) -> None:
    """A merged weight holds one adapter."""
    if any(layer.merged for layer in adapted_layers(model).values()):
        raise ValueError("the model is merged: unmerge(model) first.")
