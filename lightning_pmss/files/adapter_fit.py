"""Whether a model has the layers of an adapter file, of the same shapes, and no others of their kinds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from lightning_pmss.files.adapter_file import AdapterFile, AdapterModule
from lightning_pmss.layers.adapted import AdaptedLinear
from lightning_pmss.layers.convertible import canonical_shape, is_linear, is_supported
from lightning_pmss.layers.expert_layer import label
from lightning_pmss.messages import kind_of, one_line
from lightning_pmss.methods.method import Update
from lightning_pmss.store.shards import few


def check_modules(
    adapter: AdapterFile,
    modules: Mapping[str, nn.Module],
    wanted: set[str] | None,
    model: str,
    beside: Sequence[str] = (),
) -> None:
    """Refuse a model whose layers are not the adapter's, or have other shapes.

    Args:
        adapter: The adapter.
        modules: The model's modules by canonical name.
        wanted: Names of the layers that are converted already; None if the model is not converted.
        model: Name of the model's class, for messages.
        beside: Result of `matrices_beside` for the adapter.
    """
    folder = adapter.folder
    if absent := [name for name in adapter.modules if name not in modules]:
        raise ValueError(
            f"{folder} has layers that the model does not have: {few(absent)}. Load it into the architecture it was trained "
            f"on ({one_line(adapter.base_model or 'name not recorded')}).{_where_else(absent, modules)}"
        )
    for name, stored in adapter.modules.items():
        module = modules[name]
        if not isinstance(module, AdaptedLinear) and not is_supported(module):
            kind = type(module).__name__
            raise ValueError(f"{folder}: {name} is a {kind} in this model, not a layer that can be converted.")
        if canonical_shape(module) != stored.shape:
            raise ValueError(
                f"{folder}: {name} was trained on W [out, in] = {list(stored.shape)}, and is "
                f"{list(canonical_shape(module))} in this model. Load it into the base it was trained on."
            )
    if wanted is None:
        _refuse_deeper(adapter, modules, beside)
    else:
        more, less = sorted(wanted - set(adapter.modules)), sorted(set(adapter.modules) - wanted)
        differ = [
            name
            for name, stored in adapter.modules.items()
            if isinstance(layer := modules[name], AdaptedLinear) and not _same_indices(layer, stored)
        ]
        if more or less or differ:
            raise ValueError(
                f"the model is already converted differently from {folder}: other layers or indices in "
                f"{few(more + less + differ)}. Load the adapter into a fresh model."
            )


def _refuse_deeper(adapter: AdapterFile, modules: Mapping[str, nn.Module], beside: Sequence[str]) -> None:
    """Refuse a model with further layers of the same kinds, such as 24 blocks for an adapter of 16."""
    left_out = adapter.left_out
    if left_out is None:  # written by an early version, with patterns instead of names; they are not run
        if adapter.options.target_modules != "all-linear" or adapter.options.exclude_modules:
            return
        left_out = []
    in_full = {key.rpartition(".")[0] for key in adapter.also_train}
    known, kinds = {*adapter.modules, *left_out, *in_full}, {kind_of(name) for name in adapter.modules}
    more = [n for n, m in modules.items() if is_linear(m) and not {n, label(n, m)} & known and kind_of(n) in kinds]
    if more := [*more, *(name for name in beside if name not in known)]:
        raise ValueError(
            f"{adapter.folder}: its options select other layers in this model than the ones stored: {few(more)}. Load it into"
            " the architecture it was trained on."
        )


def _where_else(absent: list[str], modules: Mapping[str, nn.Module]) -> str:
    """Suggest a module inside the model that has the missing names, if there is one."""
    first = absent[0]
    owners = [name.removesuffix(f".{first}") for name in modules if name.endswith(f".{first}")]
    owners = [owner for owner in owners if all(f"{owner}.{name}" in modules for name in absent)]
    return f" Its module `{owners[0]}` has them: load_adapter(model.{owners[0]}, folder)." if owners else ""


def _same_indices(layer: AdaptedLinear, stored: AdapterModule) -> bool:
    own, theirs = layer.indices(), stored.update.indices()
    same = type(stored.update) is layer.method.update_class and stored.update.rank == layer.rank
    same = same and _shapes(stored.update) == _shapes(layer.update())
    return same and all(torch.equal(own[name].cpu(), index) for name, index in theirs.items())


def _shapes(update: Update) -> list[torch.Size]:
    return [tensor.shape for tensor in update.tensors().values()]
