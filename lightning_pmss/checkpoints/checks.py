"""Whether a checkpoint fits a converted module: asked before anything of it is loaded."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pmss.checkpoints.reading import DAMAGED
from lightning_pmss.checkpoints.record import CheckpointRecord, CheckpointRecord1, check_layer
from lightning_pmss.conversion.convert import conversion_of, pmss_layers
from lightning_pmss.conversion.converted import frozen_but_fresh
from lightning_pmss.layers.fingerprint import same_base
from lightning_pmss.layers.parts import clean_name, is_sharded, own_part
from lightning_pmss.messages import some
from lightning_pmss.methods.pmss.coordinates import PMSSCore, coordinate_frame, is_finite
from lightning_pmss.methods.pmss.layer import PMSSLinear, canonical_shape
from lightning_pmss.store import misfit, not_finite, refuse_odd_type

Record = CheckpointRecord1 | CheckpointRecord
# What V means; a checkpoint with other values than the run's must not be loaded. Shapes tell the rest.
_MEANING = ("coordinates", "scale")


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
        trained: Keys and shapes that it needs, from `trained_shapes`.
        known: All keys of its state dict.
        stored: Keys and shapes that the checkpoint holds.
        made: What the checkpoint says of itself.
        where: The checkpoint, for messages.

    Raises:
        ValueError: It lacks trained tensors, holds foreign ones, has other shapes, or another meaning.
    """
    if not any(key in stored for key in trained if key.endswith("core.weight")):
        raise ValueError(
            f"{where} holds no PMSS adapter (no `*.core.weight` key). To start from its weights, load them into the model"
            " before the Trainer runs, and drop ckpt_path."
        )
    problems = []
    lacking = set(trained) - set(stored)
    if random := sorted(lacking & frozen_but_fresh(module)):
        warnings.warn(
            f"{where} does not hold {some(random)}, which are in no file of the base either: an earlier version made it. They"
            " have other values now than in the run that made it.",
            stacklevel=2,
        )
    if missing := sorted(lacking - set(random)):
        problems.append(f"lacks {some(missing)}")
    if foreign := sorted(set(stored) - known):
        problems.append(f"holds {some(foreign)}, which this model does not have")
    shapes = [k for k in sorted(set(stored) & set(trained)) if tuple(stored[k]) != trained[k]]
    if shapes:
        k = shapes[0]
        problems.append(f"holds `{k}` of shape {tuple(stored[k])} where this run has {trained[k]} ({len(shapes)} such)")
    config = conversion_of(module).config.to_dict()  # type: ignore[union-attr]
    for field in _MEANING:
        if field in made.config and made.config[field] != config[field]:
            problems.append(f"was made with {field}={made.config[field]!r}, this run has {config[field]!r}")
    if lost := sorted(set(pmss_layers(module)) - set(made.prints)):
        problems.append(f"says nothing of {some(lost)}")
    if problems:
        raise ValueError(
            f"{where} does not fit this run: it {'; it '.join(problems)}. Use the options of the run that made it."
        )


def check_state(module: nn.Module, made: Record, state: Mapping[str, Any], where: str) -> None:
    """Refuse tensors that are none of this model's, before anything is loaded.

    Args:
        module: The converted module, whose weights are whole here.
        made: What the checkpoint says of itself.
        state: The checkpoint's state dict.
        where: The checkpoint, for messages.

    Raises:
        ValueError: Some are no indices or would not be finite; the rows and columns of some layers differ from those that the
            fingerprints were taken of.
    """
    prefixes = {id(m): clean_name(n) for n, m in module.named_modules()}
    strangers, broken = [], []
    for name, layer in pmss_layers(module).items():
        v, rows, cols = check_layer(state, canonical_shape(layer), layer.coordinates, prefixes[id(layer)], where)
        w = layer.base_weight()
        rows, cols = rows.to(w.device), cols.to(w.device)
        if not same_base(made.prints[name], w[rows], w[:, cols]):
            strangers.append(name)
        elif not is_finite(_core(layer, w, rows, cols, name), v.to(w.device), layer.scale):
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
    """Refuse to save trained tensors that are NaN or infinite; a collective where they are kept in parts.

    Args:
        module: The converted module, as the strategy trains it.
        states: State dicts that are about to be written, of whole tensors under clean names.
        path: Of the checkpoint.
        but: Clean names of buffers that never were finite, such as an attention mask.

    Raises:
        RuntimeError: Some are; on all ranks.
    """
    live = {clean_name(n): own_part(p) for n, p in module.named_parameters() if p.requires_grad}
    found = {k: v for state in states.values() for k, v in state.items() if v.is_floating_point() and k not in but}
    broken = not_finite(live) or not_finite(found)
    if is_sharded(module):
        told: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(told, broken)
        broken = sorted({name for names in told for name in names})
    if broken:
        raise RuntimeError(
            f"the trained {some(broken)} have NaN or infinite values, so the checkpoint {path} is not written, and earlier ones"
            " stay. The training has diverged: go back to the last checkpoint, with a lower learning rate."
        )


def _core(layer: PMSSLinear, weight: Tensor, rows: Tensor, cols: Tensor, name: str) -> PMSSCore:
    """The layer's own core where it has these rows and columns, else one with their coordinates."""
    if torch.equal(layer.rows.to(rows.device), rows) and torch.equal(layer.cols.to(cols.device), cols):
        return layer.core
    frame = coordinate_frame(weight[:, cols], weight[rows], layer.coordinates, name, weight=weight)
    return PMSSCore(len(cols), len(rows), frame, layer.core.weight.dtype, weight.device)


def refuse_strangers(strangers: list[str], where: str) -> None:
    """Name the layers whose weights are not those that a checkpoint was trained on.

    Raises:
        ValueError: There are some.
    """
    if strangers:
        raise ValueError(
            f"{where} belongs to another base model: the rows and columns of {some(strangers)} differ from those it"
            " was trained on. Load the weights that the run started from."
        )


def same_print(here: Mapping[str, str], there: Mapping[str, str]) -> bool:
    """Whether two fingerprints agree in the coarser of their dtypes."""
    names = {here["dtype"], there["dtype"]}
    narrow = names - {"float32"} or names
    return any(here[n] == there[n] for n in narrow)
