"""Fresh tensors: tensors of a model that no file of its base contains, such as a new head or the rows of added tokens.

They are initialised at random, differently in each process. So the adapter file stores them, from the first row that no file of
the base contains. Only Hugging Face models are covered, because others do not record their base.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pmss.conversion.left_out import HEAD
from lightning_pmss.conversion.report import ConversionReport
from lightning_pmss.conversion.roots import adapted_root, canonical_owners, is_hugging_face
from lightning_pmss.files.adapter_file import AdapterFile, FreshTensor
from lightning_pmss.files.architecture import names_in_the_model
from lightning_pmss.files.base import base_of
from lightning_pmss.files.model_folder import OF_A_HEAD
from lightning_pmss.layers.adapted import AdaptedLinear
from lightning_pmss.layers.adapter import Adapter, FrozenTensors
from lightning_pmss.layers.matrices import matrix_layers
from lightning_pmss.layers.parts import clean_name, is_fsdp1, whole_shape
from lightning_pmss.layers.quantised import quantisation_of
from lightning_pmss.messages import one_line
from lightning_pmss.store import misfit
from lightning_pmss.store.shards import ShardReader, TensorInfo, few, open_shards


def fresh_tensors(model: nn.Module, at: str | None = None) -> dict[str, int]:
    """Map the canonical name of each fresh tensor to the number of its rows in the base's files; 0 if it is not there.

    A tensor with fewer rows than in the files is included with all its rows, because loading it needs a model of that size.
    Call it before a strategy shards the model.

    Args:
        model: The model. Without safetensors files of its base, the result is empty.
        at: Full name of the root, if an adapter file names it and the model is not converted; see `adapted_root`.
    """
    root, _ = adapted_root(model, at)
    if not is_hugging_face(root) or (folder := base_of(model).folder) is None:
        return {}
    try:
        reader = open_shards(folder)
    except (OSError, ValueError):  # files other than safetensors are not read
        return {}
    stored, changed = names_in_the_model(root, reader)
    flat = is_fsdp1(model)  # parameters have other shapes
    ignored = [re.compile(p) for p in getattr(root, "_keys_to_ignore_on_load_missing", None) or ()]
    found: dict[str, int] = {}
    groups: dict[int, list[tuple[str, str, nn.Module, Tensor]]] = {}
    for own, name, module, tensor in _tensors(model, root, at):
        groups.setdefault(id(tensor), []).append((own, name, module, tensor))
    for group in groups.values():  # tied tensors are stored under one of their names
        infos = [info for own, *_ in group if (info := _stored(own, stored, root)) is not None]
        _, name, module, tensor = group[0]
        if not infos:
            if not any(pattern.search(own) for pattern in ignored for own, *_ in group):
                found[name] = 0
        elif infos[0].key not in changed and quantisation_of(module) is None and not flat:
            shape, there = whole_shape(tensor), infos[0].shape
            if shape != there:
                same_rows = len(shape) == len(there) > 0 and shape[1:] == there[1:]
                found[name] = min(shape[0], there[0]) if same_rows else 0
    return found


def untrained(fresh: Mapping[str, int], report: ConversionReport) -> dict[str, int]:
    """Return the fresh tensors that stay frozen: those outside of the modules of ``also_train``."""
    return {n: start for n, start in fresh.items() if not any(n.startswith(f"{m}.") for m in report.also_train)}


def live_tensors(model: nn.Module, names: Iterable[str], at: str | None = None) -> dict[str, Tensor]:
    """Return the named parameters and buffers that exist, for a merged layer its pristine weight.

    See `fresh_tensors` for ``at``.
    """
    owners = dict(canonical_owners(model, at))
    found = {}
    for name in names:
        owner, _, key = name.rpartition(".")
        module = owners.get(owner)
        value = None if module is None else module._parameters.get(key, module._buffers.get(key))
        if isinstance(module, AdaptedLinear) and key == "weight" and module.pristine is not None:
            value = module.pristine
        own = None if module is None else matrix_layers(module).get(key)
        if own is not None and own.pristine is not None:
            value = own.pristine
        if value is not None:
            found[name] = value
    return found


def state_keys(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Map the clean full name of each tensor to its canonical name."""
    full = {id(module): clean_name(name) for name, module in model.named_modules()}
    owners = dict(canonical_owners(model, None))
    found = {}
    for name in names:
        owner, _, key = name.rpartition(".")
        found[f"{full[id(owners[owner])]}.{key}".lstrip(".")] = name
    return found


def new_rows(live: Mapping[str, Tensor], kept: Mapping[str, FreshTensor]) -> dict[str, Tensor]:
    """Return views of the live rows for which an adapter file has values."""
    return {n: live[n].detach()[fresh.start :] if live[n].dim() else live[n].detach() for n, fresh in kept.items()}


def check_fresh(adapter: AdapterFile, live: Mapping[str, Tensor], model: nn.Module) -> None:
    """Refuse a model that lacks a fresh tensor of the adapter, or has it in another shape."""
    for name, kept in adapter.fresh.items():
        place = live.get(name)
        if place is None:
            raise ValueError(
                f"{adapter.folder} contains {one_line(name)}, which this {type(model).__name__} does not have."
                f" Build the model as it was built for the training ({one_line(adapter.model_class or 'class not recorded')})."
            )
        if tuple(place.shape) != kept.shape:
            raise ValueError(other_size(adapter, name, kept.shape, place.shape, model))
        if reason := misfit(kept.value, place.dtype):
            raise ValueError(f"{adapter.folder}: {name} {reason}. Build the model as it was built for the training.")


def other_size(adapter: AdapterFile, name: str, there: Sequence[int], here: Sequence[int], model: nn.Module) -> str:
    """Message for a tensor that had another shape when the adapter was trained."""
    text = f"{adapter.folder}: {one_line(name)} has the shape {list(there)}, the model's {list(here)}."
    if len(there) == len(here) > 0 and list(there)[1:] == list(here)[1:] and _is_of_tokens(name, model):
        return (
            f"{text} The adapter was trained with {there[0] - here[0]:+} tokens: call"
            f" model.resize_token_embeddings({there[0]}) before it is loaded."
        )
    return f"{text} Build the model with the same settings (a head: the same number of labels)."


def _is_of_tokens(name: str, model: nn.Module) -> bool:
    """Whether this tensor belongs to the input or output embeddings, with a row for each token."""
    root = adapted_root(model)[0]
    parts = [getattr(root, f"get_{side}_embeddings", lambda: None)() for side in ("input", "output")]
    owner = dict(canonical_owners(model, None)).get(name.rpartition(".")[0])
    return owner is not None and any(owner is part for part in parts)


@torch.no_grad()
def rows_to_keep(value: Tensor, start: int, stored: Tensor | None) -> FreshTensor:
    """Keep a tensor's new rows, or all rows if the others differ from the base's.

    Args:
        value: The whole tensor.
        start: Number of its rows in the base's files.
        stored: The base's tensor, if there is one.
    """
    value = value.detach().cpu()
    if start == 0 or stored is None or not torch.equal(stored[:start].to(value.dtype), value[:start]):
        return FreshTensor(value.clone(), 0)
    return FreshTensor(value[start:].clone(), start)


def to_be_kept(model: nn.Module, values: Mapping[str, Tensor], fresh: Mapping[str, int]) -> dict[str, FreshTensor]:
    """Apply `rows_to_keep` to all fresh tensors.

    Args:
        model: The model, to find the base's files.
        values: The whole tensors by canonical name.
        fresh: Result of `fresh_tensors` for the same names.
    """
    folder = base_of(model).folder if any(fresh.values()) else None
    if folder is None:
        return {name: rows_to_keep(values[name], 0, None) for name in fresh}
    root, _ = adapted_root(model)
    with open_shards(folder) as reader:
        stored, _ = names_in_the_model(root, reader)
        infos = {name: _stored(name, stored, root) for name in fresh}
        return {
            name: rows_to_keep(values[name], start, None if (info := infos[name]) is None else reader.read(info.key))
            for name, start in fresh.items()
        }


def fresh_warnings(model: nn.Module, report: ConversionReport) -> list[str]:
    """List warnings for the start of training: fresh tensors that stay frozen, and the option that trains them."""
    owners, converted = dict(canonical_owners(model, None)), {layer.name for layer in report.layers}
    new, grown, adapted = [], [], []
    for name, start in untrained(report.fresh or {}, report).items():
        owner, _, key = name.rpartition(".")
        parameter = owners[owner]._parameters.get(key)
        if parameter is None:
            continue
        if owner in converted:
            adapted.append(owner)
        elif start == 0:
            new.append(owner)
        elif (rows := whole_shape(parameter)[0]) > start:
            grown.append((f"{name} ({rows - start} rows)", owner))
    warnings = []
    if new:
        warnings.append(
            f"{few(_unique(new))}: in no file of the base, so freshly initialised, and frozen. The adapter file stores these"
            f" values; to train them, type {_remedy(new)}."
        )
    if grown:
        warnings.append(
            f"{few([text for text, _ in grown])}: missing in the base's files, so freshly initialised, and frozen. The"
            f" adapter file stores these rows; to train them, type {_remedy([owner for _, owner in grown])}."
        )
    if adapted:
        warnings.append(
            f"{few(_unique(adapted))}: converted, but their weights are in no file of the base, so freshly initialised: an"
            f" update of random rows and columns learns little. The adapter file stores them; better type {_remedy(adapted)}."
        )
    return warnings


def frozen_beside(model: nn.Module, report: ConversionReport) -> list[str]:
    """Return the frozen heads without a file: outside of a Hugging Face model, or in any other model."""
    heads = [name for name, why in report.left_out.items() if why == HEAD]
    root, _ = adapted_root(model)
    if not is_hugging_face(root):
        return heads
    inside, owners = {id(module) for module in root.modules()}, dict(canonical_owners(model, None))
    return [name for name in heads if id(owners[name]) not in inside]


def settings_of(model: nn.Module, fresh: Mapping[str, int]) -> dict[str, Any]:
    """Return the settings that the fresh tensors change in config.json: sizes such as ``vocab_size``, a head's labels.

    Returns:
        Setting -> value; a nested setting has a dotted name.
    """
    config = getattr(adapted_root(model)[0], "config", None)
    folder = base_of(model).folder if fresh else None
    if config is None or folder is None:
        return {}
    from transformers import AutoConfig

    try:
        before = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError):
        return {}
    live = live_tensors(model, list(fresh))
    sizes = {int(whole_shape(value)[0]) for value in live.values() if value.dim()}
    now = config.to_dict()
    if any(start == 0 for start in fresh.values()):  # a new head: the class of the model is another one
        now["architectures"] = [type(adapted_root(model)[0]).__name__]
    return dict(_changed(before.to_dict(), now, sizes))


def _changed(
    before: Mapping[str, Any], now: Mapping[str, Any], sizes: set[int], start: str = ""
) -> Iterator[tuple[str, Any]]:
    for key, value in now.items():
        old = before.get(key)
        if isinstance(value, dict) and isinstance(old, dict) and key not in OF_A_HEAD:
            yield from _changed(old, value, sizes, f"{start}{key}.")
        elif value != old and (key in OF_A_HEAD or type(value) is int and type(old) is int and value in sizes):
            yield f"{start}{key}", value


def _tensors(model: nn.Module, root: nn.Module, at: str | None) -> Iterator[tuple[str, str, nn.Module, Tensor]]:
    """Yield (name in the root, canonical name, owner, tensor) of each tensor that the conversion did not add."""
    canonical = {id(module): name for name, module in canonical_owners(model, at)}
    for full, module in canonical_owners(root, ""):
        if isinstance(module, (Adapter, FrozenTensors)):
            continue
        held: list[tuple[str, Tensor]] = [(k, p) for k, p in module._parameters.items() if p is not None]
        held += [
            (k, b) for k, b in module._buffers.items() if b is not None and k not in module._non_persistent_buffers_set
        ]  # type: ignore[misc]
        for key, tensor in held:
            yield f"{full}.{key}".lstrip("."), f"{canonical[id(module)]}.{key}".lstrip("."), module, tensor


def _stored(name: str, reader: ShardReader, root: nn.Module) -> TensorInfo | None:
    """Find a tensor in the files, where its name may have the body's prefix or not."""
    prefix = f"{getattr(root, 'base_model_prefix', '') or '_'}."
    return (
        reader.tensors.get(name) or reader.tensors.get(prefix + name) or reader.tensors.get(name.removeprefix(prefix))
    )


def _unique(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _remedy(owners: Sequence[str]) -> str:
    return f"also_train=[{', '.join(repr(owner) for owner in _unique(owners)[:8])}]"
