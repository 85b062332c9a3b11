"""Check that a checkpoint fits a converted module, before anything of it is loaded."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pmss.checkpoints.reading import DAMAGED
from lightning_pmss.checkpoints.record import CheckpointRecord, CheckpointRecord1, check_layer
from lightning_pmss.conversion.convert import adapted_layers, conversion_of
from lightning_pmss.conversion.converted import frozen_but_fresh
from lightning_pmss.layers.adapted import AdaptedLinear, trained_key
from lightning_pmss.layers.convertible import canonical_shape
from lightning_pmss.layers.expert_stack import ExpertStack
from lightning_pmss.layers.experts import names_of_modules, without_stacks
from lightning_pmss.layers.fingerprint import same_base
from lightning_pmss.layers.matrices import MatrixAdapter
from lightning_pmss.layers.parts import clean_name, is_sharded, own_part
from lightning_pmss.layers.products import core_dtype
from lightning_pmss.messages import some
from lightning_pmss.store import misfit, not_finite, refuse_odd_type

Record = CheckpointRecord1 | CheckpointRecord


def check(
    module: nn.Module,
    trained: Mapping[str, tuple[int, ...]],
    known: set[str],
    stored: Mapping[str, tuple[int, ...]],
    made: Record,
    where: str,
) -> None:
    """Refuse a checkpoint that does not fit the converted module, before anything is loaded.

    Args:
        module: The converted module.
        trained: Result of `trained_shapes` for the module.
        known: All keys of the module's state dict.
        stored: Shapes of the checkpoint's tensors by key.
        made: The ``pmss`` entry of the checkpoint.
        where: The checkpoint, for messages.

    Raises:
        ValueError: The checkpoint lacks trained tensors, contains foreign ones, or was made with other shapes or options.
    """
    config = conversion_of(module).config  # type: ignore[union-attr]
    if not any(key in stored for key in _adapter_keys(module)):
        raise ValueError(
            f"{where} contains no {config.label()} adapter of this model's layers. To start from its weights, load them into"
            " the model before the Trainer runs, and drop ckpt_path."
        )
    problems = []
    lacking = set(trained) - set(stored)
    if random := sorted(lacking & frozen_but_fresh(module)):
        warnings.warn(
            f"{where} does not contain {some(random)}, which are in no file of the base either: an earlier version made it."
            " They have other values now than in the run that made it.",
            stacklevel=2,
        )
    if missing := sorted(lacking - set(random)):
        problems.append(f"lacks {some(missing)}")
    if foreign := sorted(set(stored) - known):
        problems.append(f"contains {some(foreign)}, which this model does not have")
    shapes = [k for k in sorted(set(stored) & set(trained)) if tuple(stored[k]) != trained[k]]
    if shapes:
        k = shapes[0]
        problems.append(f"has `{k}` of shape {tuple(stored[k])} where this run has {trained[k]} ({len(shapes)} such)")
    if made.method != config.method:
        problems.append(f"was made by the method {made.method!r}, this run has {config.method!r}")
    defaults = {option.name: option.default for option in fields(config)}
    for field, value in config.meaning().items():  # shapes show the other options
        stored_value = made.config.get(field, defaults[field])  # what an older version did not write was the default
        if made.method == config.method and stored_value != value:
            problems.append(f"was made with {field}={stored_value!r}, this run has {value!r}")
    if lost := sorted(set(adapted_layers(module)) - set(made.prints)):
        problems.append(f"says nothing of {some(lost)}")
    if problems:
        raise ValueError(
            f"{where} does not fit this run: it {'; it '.join(problems)}. Use the options of the run that made it."
        )


def check_state(module: nn.Module, made: Record, state: Mapping[str, Any], where: str) -> None:
    """Refuse tensors that do not belong to this model's weights, before anything is loaded.

    Args:
        module: The converted module, not sharded.
        made: The ``pmss`` entry of the checkpoint.
        state: The checkpoint's state dict.
        where: The checkpoint, for messages.

    Raises:
        ValueError: Indices are invalid, values would not be finite, or the weights of a layer are not those that its
            fingerprint was made of.
    """
    prefixes = names_of_modules(module)
    of_each = without_stacks(state)
    strangers, broken = [], []
    for name, layer in adapted_layers(module).items():
        prefix, shape = prefixes[id(layer)], canonical_shape(layer)
        stored = check_layer(
            of_each, shape, layer.method, prefix, where, layer.rank if layer.index_names == () else None
        )
        w = layer.base_weight()
        indices = {part: index.to(w.device) for part, index in stored.indices.items()}
        if not same_base(made.prints[name], *layer.reads_of(w, indices)):
            strangers.append(name)
            continue
        own = {part: value.to(w.device) for part, value in stored.trained.items()}
        with torch.no_grad():
            update = layer.method.update_of(own | _derived(layer, w, indices, name), layer.scale)
        if not_finite(update.numbers()):
            broken.append(name)
    refuse_strangers(strangers, where)
    trained = {clean_name(n): p for n, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}
    values = {key: value for key, value in state.items() if clean_name(key) in trained}
    for key, value in values.items():
        refuse_odd_type(value, key, where, DAMAGED)
        if not not_finite({key: value}) and (reason := misfit(value, trained[clean_name(key)].dtype)):
            raise ValueError(f"{where}: {key} {reason}. {DAMAGED}")
    broken += not_finite(values)
    if broken:
        raise ValueError(f"{where}: {some(broken)} would be NaN or infinite. {DAMAGED}")


def refuse_nonfinite(
    module: nn.Module, states: Mapping[str, Mapping[str, Any]], path: Any, but: Collection[str] = ()
) -> None:
    """Refuse to save trained tensors that are NaN or infinite; a collective if they are sharded.

    Args:
        module: The converted module, as the strategy trains it.
        states: State dicts to write, with whole tensors under clean names.
        path: Path of the checkpoint, for the message.
        but: Clean names of buffers that are not finite on purpose, such as an attention mask.

    Raises:
        RuntimeError: A trained tensor is NaN or infinite; raised on all ranks.
    """
    live = {clean_name(n): own_part(p) for n, p in module.named_parameters() if p.requires_grad}
    found = {k: v for state in states.values() for k, v in state.items() if v.is_floating_point() and k not in but}
    broken = not_finite(live) or not_finite(found)
    if is_sharded(module):
        found_by_rank: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(found_by_rank, broken)
        broken = sorted({name for names in found_by_rank for name in names})
    if broken:
        raise RuntimeError(
            f"the trained {some(broken)} have NaN or infinite values, so the checkpoint {path} is not written, and earlier ones"
            " stay. The training has diverged: go back to the last checkpoint, with a lower learning rate."
        )


def _derived(layer: AdaptedLinear, weight: Tensor, indices: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Frozen and index tensors of a layer for given indices: the layer's own if it has these, else derived from W."""
    if all(torch.equal(own.to(weight.device), indices[part]) for part, own in layer.indices().items()):
        return layer.core.frozen() | dict(indices)
    found = layer.method.derive(weight, layer.rank, name, indices)
    return {part: t.to(core_dtype(weight.dtype)) if t.is_floating_point() else t for part, t in found.items()}


def _adapter_keys(module: nn.Module) -> list[str]:
    """Keys of the trained tensors of all converted layers."""
    return [
        clean_name(f"{name}.{trained_key(part)}".lstrip("."))
        for name, layer in module.named_modules()
        if isinstance(layer, (AdaptedLinear, ExpertStack, MatrixAdapter))
        for part in layer.core.trained()
    ]


def refuse_strangers(strangers: list[str], where: str) -> None:
    """Refuse a checkpoint that was trained on other weights than these layers have.

    Raises:
        ValueError: ``strangers`` is not empty.
    """
    if strangers:
        raise ValueError(
            f"{where} belongs to another base model: the weights of {some(strangers)} are not those it was trained"
            " on. Load the weights that the run started from."
        )


def same_print(here: Mapping[str, str], there: Mapping[str, str]) -> bool:
    """Whether two fingerprints agree in the coarser of their dtypes."""
    if not here or not there:  # the update reads nothing of its base
        return not here and not there
    names = {here["dtype"], there["dtype"]}
    narrow = names - {"float32"} or names
    return any(here[n] == there[n] for n in narrow)
