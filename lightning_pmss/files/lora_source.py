"""Where an export takes its numbers from: a live model, or an adapter folder and its base on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_pmss.conversion.converted import converted
from lightning_pmss.conversion.roots import adapted_root, canonical_modules
from lightning_pmss.files.adapter import class_path, other_names, tensors_of
from lightning_pmss.files.adapter_file import AdapterFile, FreshTensor
from lightning_pmss.files.base import base_of
from lightning_pmss.files.fresh import fresh_tensors, live_tensors, untrained
from lightning_pmss.files.naming import Wording, match_names, refuse_misfits, stored_shapes
from lightning_pmss.layers.convertible import canonical_shape
from lightning_pmss.layers.guard import refuse_disabled
from lightning_pmss.layers.parts import clean_name, is_sharded
from lightning_pmss.methods.method import Factors, Update
from lightning_pmss.store import not_finite
from lightning_pmss.store.shards import ShardReader, few


@dataclass(frozen=True)
class Layer:
    """A converted layer before its numbers are read.

    Attributes:
        shape: (out, in) of W.
        transposed: Whether the base stores W^T (``Conv1D``).
        rank: Of the update.
    """

    shape: tuple[int, int]
    transposed: bool
    rank: int


@dataclass(frozen=True)
class Source:
    """An adapter and its base.

    Attributes:
        layers: By canonical name.
        factors: Of a layer's update, float64; ValueError where they are another base's, or it is no product of thin matrices.
        update: Of a layer.
        weight: The pristine W of a layer, canonical, [out, in].
        also_train: Tensors of the modules trained in full, and of those that no file of the base holds.
        tied: Other names of an ``also_train`` tensor.
        modules: Names of the model's modules, as far as they are known.
        double: Whether U is float64.
        base_model: Id or path of the base.
        revision: Its commit.
        model_class: Dotted path of the model's class, where it is known.
    """

    layers: Mapping[str, Layer]
    factors: Callable[[str], Factors]
    update: Callable[[str], Update]
    weight: Callable[[str], Tensor]
    also_train: Mapping[str, Tensor]
    tied: Mapping[str, list[str]]
    modules: list[str]
    double: bool
    base_model: str | None
    revision: str | None
    model_class: str | None


def model_source(model: nn.Module) -> Source:
    """The adapter of a converted model.

    Raises:
        ValueError: No converted layer, a sharded model, NaN or infinite values, or layers outside of the Hugging Face model.
    """
    report, layers = converted(model, "export")
    refuse_disabled(layers.values(), "exported")
    if is_sharded(model):
        raise ValueError(
            "a sharded model is not exported in place: call save_adapter(model, ADAPTER_DIR) on every rank, then"
            " `python -m lightning_pmss export --format peft --base MODEL_DIR --adapter ADAPTER_DIR --output LORA_DIR`."
        )
    modules = canonical_modules(model)
    root = adapted_root(model)[0]
    inside = {clean_name(name): module for name, module in root.named_modules(remove_duplicate=False)}
    if outside := [n for n in (*layers, *report.also_train) if inside.get(n) is not modules[n]]:
        raise ValueError(
            f"{few(outside)}: outside of the {type(root).__name__}, the model that peft loads a LoRA onto. Use save_adapter."
        )
    fresh = untrained(fresh_tensors(model) if report.fresh is None else report.fresh, report)
    refuse_fresh_layers(fresh, layers)
    extra = tensors_of(report.also_train, modules) | live_tensors(model, fresh)
    numbers = {f"{n}.{part}": t for n, x in layers.items() for part, t in x.update().numbers().items()}
    if broken := not_finite(numbers | extra):
        raise ValueError(
            f"NaN or infinite values in {few(broken)}: the training has diverged, and such an adapter is not exported. "
            "Go back to an earlier checkpoint."
        )
    known = base_of(model)
    return Source(
        layers={n: Layer(canonical_shape(layer), layer.transposed, layer.update().rank) for n, layer in layers.items()},
        factors=lambda name: thin(layers[name].update(), layers[name].base_weight(), name),
        update=lambda name: layers[name].update(),
        weight=lambda name: layers[name].base_weight(),
        also_train={key: value.detach() for key, value in extra.items()},
        tied=other_names(extra, model),
        modules=list(modules),
        double=any(value.dtype == torch.float64 for value in numbers.values()),
        base_model=known.name,
        revision=known.revision,
        model_class=class_path(root),
    )


def file_source(adapter: AdapterFile, reader: ShardReader) -> Source:
    """An adapter folder and the base's open shards; reads of the base what `Source.parts` is asked for.

    Raises:
        ValueError: The adapter's layers are not in the base, have other shapes there, or are quantised.
    """
    rename = _names(adapter, reader)
    refuse_misfits(adapter, reader, rename)
    owners = {key.rpartition(".")[0] for key in reader.tensors}
    modules = {name[:end] for name in owners for end in (*_dots(name), len(name))}
    # Elsewhere the checkpoint's names may differ from the model's by a prefix, which the ends of names do not show.
    beside = {n: fresh for n, fresh in adapter.fresh.items() if n.rpartition(".")[0] not in adapter.modules}
    modules -= {rename(name) for name in adapter.modules}
    modules |= set(adapter.modules)
    return Source(
        layers={n: Layer(m.shape, m.layout == "conv1d", m.update.rank) for n, m in adapter.modules.items()},
        factors=lambda name: _factors(adapter, reader, rename, name),
        update=lambda name: adapter.modules[name].update,
        weight=lambda name: _weight(adapter, reader, rename, name),
        also_train=adapter.also_train | {n: _whole(n, fresh, adapter, reader, rename) for n, fresh in beside.items()},
        tied=adapter.tied,
        modules=sorted(modules),
        double=any(t.dtype == torch.float64 for m in adapter.modules.values() for t in m.update.numbers().values()),
        base_model=adapter.base_model,
        revision=adapter.revision,
        model_class=adapter.model_class,
    )


def refuse_fresh_layers(fresh: Iterable[str], layers: Iterable[str]) -> None:
    """A LoRA is added to a weight of the base.

    Raises:
        ValueError: A converted layer's weight is in no file of the base.
    """
    if own := [name for name in layers if f"{name}.weight" in fresh]:
        raise ValueError(
            f"{few(own)}: the weight is in no file of the base, so a LoRA would have nothing to be added to. Train such layers"
            " in full instead (also_train), or merge: write_merged(model, folder)."
        )


def _whole(
    name: str, fresh: FreshTensor, adapter: AdapterFile, reader: ShardReader, rename: Callable[[str], str]
) -> Tensor:
    """A tensor that the adapter file holds, with the rows before that are the base's."""
    if fresh.start == 0:
        return fresh.value
    names = [rename(n) for n in (name, *adapter.tied.get(name, ()))]
    key = next((n for n in names if n in reader.tensors), None)
    if key is None or reader.tensors[key].shape[0] < fresh.start:
        raise ValueError(
            f"{reader.folder} does not have the first {fresh.start} rows of {name}, which the adapter takes from it."
        )
    before = reader.read(key)[: fresh.start]
    return torch.cat([before, fresh.value.to(before.dtype)])


def thin(update: Update, weight: Tensor, name: str) -> Factors:
    """An update as a product of thin matrices, float64.

    Raises:
        ValueError: It is none.
    """
    device = next(iter(update.tensors().values())).device
    if (found := update.factors(weight.to(device), torch.float64)) is None:
        raise ValueError(
            f"the update of {name} is no product of two thin matrices, so no LoRA is equal to it. Merge instead:"
            " `python -m lightning_pmss merge`."
        )
    return found


def _factors(adapter: AdapterFile, reader: ShardReader, rename: Callable[[str], str], name: str) -> Factors:
    weight = _weight(adapter, reader, rename, name)
    if not adapter.modules[name].is_of(weight):
        # Look at some more layers, so that the message says whether it is one or all.
        others = [n for n in adapter.modules if n != name][:20]
        wrong = [n for n in others if not adapter.modules[n].is_of(_weight(adapter, reader, rename, n))]
        raise ValueError(adapter.wrong_base([name, *wrong], str(reader.folder)))
    return thin(adapter.modules[name].update, weight, name)


def _weight(adapter: AdapterFile, reader: ShardReader, rename: Callable[[str], str], name: str) -> Tensor:
    own = adapter.fresh.get(f"{name}.weight")
    stored = reader.read(f"{rename(name)}.weight") if own is None else own.value
    return adapter.modules[name].canonical(stored)


def _names(adapter: AdapterFile, reader: ShardReader) -> Callable[[str], str]:
    in_python = "load_adapter(model, ADAPTER_DIR), then the same on the model."
    wording = Wording(
        whose="the adapter's",
        owner=f"the adapter {adapter.folder}",
        expects="was trained on",
        missing=(
            "Give the base that the adapter was trained on; if its checkpoint stores these layers under other names, load "
            f"base and adapter in Python instead: {in_python}"
        ),
        ambiguous=f"Work in Python instead: {in_python}",
        mismatch="Give the base that the adapter was trained on.",
        quantised="a quantised form, of which no rows and columns can be read. Give the unquantised base.",
    )
    return match_names(stored_shapes(adapter), reader, reader.folder, wording)


def _dots(name: str) -> list[int]:
    return [position for position, letter in enumerate(name) if letter == "."]
