"""Storage of a model's named adapters, and copying between the storage and the live layers."""

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
    """Tensors of one named adapter.

    Attributes:
        layers: Trained, frozen and index tensors of each layer that the adapter has, as `Method.fitted` made them.
        extra: Tensors of the modules that it trains in full.
        fresh: Freshly initialised tensors that it was trained with; no file of the base contains them.
    """

    layers: dict[str, dict[str, Tensor]]
    extra: dict[str, Tensor]
    fresh: dict[str, FreshTensor] = field(default_factory=dict)


@dataclass
class Bank:
    """All named adapters of a model.

    Attributes:
        adapters: The adapters by name.
        base: The base's values in the modules trained in full.
        active: The name of the live adapter.
    """

    adapters: dict[str, NamedAdapter]
    base: dict[str, Tensor]
    active: str


def attach(model: nn.Module, bank: Bank) -> None:
    """Store the bank as an attribute of the model."""
    setattr(adapted_root(model)[0], _ATTRIBUTE, bank)


def find_bank(model: nn.Module) -> Bank | None:
    """Return the model's bank, or None."""
    found: Bank | None = getattr(adapted_root(model)[0], _ATTRIBUTE, None)
    return found


def bank_of(model: nn.Module) -> Bank:
    """Return the model's bank.

    Raises:
        ValueError: The model has no bank, or is sharded.
    """
    if is_sharded(model):
        raise ValueError("a sharded model can have only one adapter; use one device or DDP for several.")
    if (bank := find_bank(model)) is None:
        raise ValueError(
            f"{type(model).__name__} has no named adapters: load_adapters(model, {{'name': folder, ...}}) comes first."
        )
    return bank


@torch.no_grad()
def take(model: nn.Module, bank: Bank) -> None:
    """Copy the live values, which may have been trained, into the active adapter."""
    active = bank.adapters[bank.active]
    for name, layer in adapted_layers(model).items():
        if name in active.layers or has_update(layer):  # else the adapter does not have this layer
            active.layers[name] = {n: t.detach().clone() for n, t in layer.tensors().items()}
    live = places(model)
    for key, value in bank.base.items():
        if key in active.extra or not torch.equal(live[key], value):
            active.extra[key] = live[key].detach().clone()


@torch.no_grad()
def put(model: nn.Module, bank: Bank, name: str) -> None:
    """Copy an adapter into the live layers and modules, and make it the active one."""
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
            layer.core.reshape(state)
            layer.set_numbers(state)
        layer.fingerprint = None  # computed again, from the new rows and columns, where it is needed
    fill(places(model), bank.base | adapter.extra)
    fill_fresh(model, adapter.fresh)
    bank.active = name


def has_update(layer: AdaptedLinear) -> bool:
    """Whether the layer's update can be nonzero: no factor is zero throughout."""
    return all(bool(value.any()) for value in layer.update().numbers().values())


def places(model: nn.Module) -> dict[str, Tensor]:
    """Return the live tensors of the modules trained in full."""
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
    """Copy an adapter's fresh tensors into the model.

    The base has no values for them, so they stay until another adapter's replace them. See `fresh_tensors` for ``at``.
    """
    for key, place in new_rows(live_tensors(model, fresh, at), fresh).items():
        place.copy_(fresh[key].value)


def different(one: Mapping[str, FreshTensor], other: Mapping[str, FreshTensor]) -> list[str]:
    """Return the names of the fresh tensors that differ between two adapters."""
    both = one.keys() | other.keys()
    return [n for n in sorted(both) if n not in one or n not in other or not torch.equal(one[n].value, other[n].value)]


def refuse_unknown(bank: Bank, name: str) -> None:
    """Refuse a name that no adapter has; list the names in use."""
    if name not in bank.adapters:
        raise ValueError(f"no adapter is called {name!r}; there are {some(list(bank.adapters))}.")


def refuse_used(bank: Bank, name: str) -> None:
    """Refuse a name that an adapter already has."""
    if name in bank.adapters:
        raise ValueError(
            f"an adapter is called {name!r} already; delete_adapter(model, {name!r}) or take another name."
        )


def refuse_merged(model: nn.Module) -> None:
    """Refuse a merged model: its weights contain one adapter."""
    if any(layer.merged for layer in adapted_layers(model).values()):
        raise ValueError("the model is merged: unmerge(model) first.")
