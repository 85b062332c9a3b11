"""Find the layers and modules of a checkpoint by canonical name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_pmss.checkpoints.reading import DAMAGED
from lightning_pmss.checkpoints.record import CheckpointRecord, FreshRecord
from lightning_pmss.layers.adapted import trained_key
from lightning_pmss.layers.layout import Layout
from lightning_pmss.messages import some
from lightning_pmss.methods import method_of
from lightning_pmss.methods.config import AdapterConfig
from lightning_pmss.methods.method import Kind
from lightning_pmss.store.shards import few


@dataclass(frozen=True)
class FoundLayer:
    """One converted layer; None stands for facts that format 1 does not contain.

    Attributes:
        key: Key of the layer in the state dict.
        fingerprint: Fingerprint of the parts of W that the update reads.
        shape: (out, in) of W.
        layout: How the base stores W; None where the checkpoint does not say.
        frame_dtype: Dtype of W when frozen tensors were derived from it; None: that of the base's file.
        rank: Rank; None: the number of indices.
    """

    key: str
    fingerprint: dict[str, str]
    shape: tuple[int, int] | None = None
    layout: Layout | None = None
    frame_dtype: str | None = None
    rank: int | None = None


@dataclass(frozen=True)
class FoundTensor:
    """One tensor of a module trained in full.

    Attributes:
        key: Key in the state dict.
        tied: Other canonical names of the tensor.
    """

    key: str
    tied: list[str]


@dataclass(frozen=True)
class Found:
    """Contents of a checkpoint by canonical name, and facts about its base.

    Attributes:
        layers: The converted layers.
        also_train: The tensors of the modules trained in full.
        full_modules: Names of these modules.
        fresh: See `CheckpointRecord`.
        settings: See `CheckpointRecord`.
        base_model: Id or path of the base.
        root: See `CheckpointRecord`.
        left_out: See `CheckpointRecord`; None if unknown.
        revision: Commit of the base.
        model_class: Dotted path of the model's class.
        quantisation: Kinds of quantisation of the base's weights.
        quantisation_settings: See `files.plain`.
    """

    layers: dict[str, FoundLayer]
    also_train: dict[str, FoundTensor]
    full_modules: list[str]
    base_model: str | None
    root: str | None = None
    left_out: list[str] | None = None
    revision: str | None = None
    model_class: str | None = None
    quantisation: list[str] = field(default_factory=list)
    quantisation_settings: dict[str, Any] = field(default_factory=dict)
    fresh: dict[str, FreshRecord] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


def described(record: CheckpointRecord, options: AdapterConfig, state: Mapping[str, Tensor], where: str) -> Found:
    """Contents of a checkpoint of format 2, from its ``pmss`` entry.

    Raises:
        ValueError: A tensor is missing, has another shape than the entry says, or is not in the entry.
    """
    in_full = record.also_train | record.fresh
    wrong = [full.key for full in in_full.values() if full.key not in state]
    if wrong:
        raise ValueError(f"{where} lacks {some(wrong)}. {DAMAGED}")
    for full in in_full.values():
        if list(state[full.key].shape) != full.shape:
            raise ValueError(
                f"{where}: `{full.key}` is {list(state[full.key].shape)}, and was written as {full.shape}. {DAMAGED}"
            )
    keys = [layer.key for layer in record.modules.values()]
    names = {n: (layer.key, [n]) for n, layer in record.modules.items()}
    names |= {n: (full.key, [n, *full.tied]) for n, full in in_full.items()}  # a tied tensor is stored once
    if strange := [n for n, (key, own) in names.items() if not any(f".{key}".endswith(f".{name}") for name in own)]:
        raise ValueError(f"{where} is damaged: {some(strange)} are no names of its tensors. {DAMAGED}")
    if len(set(keys)) != len(keys):
        raise ValueError(f"{where} is damaged: two of its layers have the same key. {DAMAGED}")
    if undescribed := sorted(_layers(state, options) - set(keys)):
        raise ValueError(f"{where} says nothing of its layers {some(undescribed)}. {DAMAGED}")
    return Found(
        layers={
            name: FoundLayer(
                layer.key,
                record.prints[name],
                (layer.shape[0], layer.shape[1]),
                layer.layout,
                layer.frame_dtype,
                layer.rank,
            )
            for name, layer in record.modules.items()
        },
        also_train={name: FoundTensor(full.key, full.tied) for name, full in record.also_train.items()},
        full_modules=record.full_modules,
        base_model=record.base.name,
        root=record.root,
        left_out=record.left_out,
        revision=record.base.revision,
        model_class=record.base.model_class,
        quantisation=record.base.quantisation,
        quantisation_settings=record.base.quantisation_settings,
        fresh=record.fresh,
        settings=record.settings,
    )


def from_keys(
    prints: Mapping[str, dict[str, str]], options: AdapterConfig, state: Mapping[str, Tensor], where: str, base: str
) -> Found:
    """Contents of a checkpoint of format 1, from its fingerprints and the keys of its state dict.

    Keys and names of the layers differ by one prefix, that of the Hugging Face model in the LightningModule.

    Raises:
        ValueError: The names do not fit the keys, or the modules trained in full are unknown.
    """
    keys = _layers(state, options)
    first = next(iter(prints))
    prefixes = sorted((key.removesuffix(first) for key in keys if key == first or key.endswith(f".{first}")), key=len)
    for prefix in prefixes:
        own = {name: f"{prefix}{name}" if f"{prefix}{name}" in keys else name for name in prints}
        if set(own.values()) == keys:
            break
    else:
        raise ValueError(
            f"{where}: its layers ({few(sorted(keys))}) are not those it has fingerprints of ({few(sorted(prints))}). {DAMAGED}"
        )
    # Format 1 does not contain the dtype from which coordinates were computed; the fingerprint's is mostly the same.
    narrow = {n: prints[n]["dtype"] if prints[n]["dtype"] != "float32" else None for n in prints}
    layers = {name: FoundLayer(own[name], dict(prints[name]), frame_dtype=narrow[name]) for name in prints}
    rest = [key for key in state if not any(key == k or key.startswith(f"{k}.") for k in own.values())]
    return Found(layers, *_full(options, rest, prefix, state, where), base)


def _full(
    options: AdapterConfig, keys: list[str], prefix: str, state: Mapping[str, Tensor], where: str
) -> tuple[dict[str, FoundTensor], list[str]]:
    """Tensors of the modules trained in full, and the names of these modules; other keys are buffers."""
    names = {key.removeprefix(prefix): key for key in keys}
    modules = {name[: dot.start()] for name in names for dot in re.finditer(r"\.", name)}
    patterns = options.also_train
    if isinstance(patterns, str):
        if not re.fullmatch(r"[\w.]+", patterns):
            raise ValueError(
                f"{where} is of format 1, which does not say which modules also_train={patterns!r} means. Resume the run with"
                " it as ckpt_path and max_steps at its step: fit then writes the adapter."
            )
        chosen = {patterns} & modules
        lost = [] if chosen else [patterns]
    else:
        chosen = {m for m in modules if any(m == p or m.endswith(f".{p}") for p in patterns)}
        lost = [p for p in patterns if not any(m == p or m.endswith(f".{p}") for m in modules)]
    if lost:
        raise ValueError(f"{where} contains nothing of {some(lost)}, which also_train names. {DAMAGED}")
    found = {name: key for name, key in names.items() if any(name.startswith(f"{module}.") for module in chosen)}
    return {name: FoundTensor(key, _tied(name, names, state)) for name, key in found.items()}, sorted(chosen)


def _tied(name: str, names: Mapping[str, str], state: Mapping[str, Tensor]) -> list[str]:
    """Other names of tensors that share this tensor's memory in the file."""
    own = state[names[name]]
    return [
        other
        for other, key in names.items()
        if other != name and own.numel() and state[key].data_ptr() == own.data_ptr() and state[key].shape == own.shape
    ]


def _layers(keys: Iterable[str], options: AdapterConfig) -> set[str]:
    """Keys of the layers with trained tensors of this method."""
    specs = method_of(options).specs((1, 1), 1)
    own = [trained_key(name) for name, spec in specs.items() if spec.kind is Kind.TRAINED]
    return {key.removesuffix(end).removesuffix(".") for key in keys for end in own if f".{key}".endswith(f".{end}")}
