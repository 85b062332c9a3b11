"""Sources of an export: a live model, or an adapter folder and its base on disk."""

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
from lightning_pmss.files.naming import base_weight, refuse_misfits, refuse_wrong_base, resolve_names
from lightning_pmss.layers.convertible import canonical_shape
from lightning_pmss.layers.expert_layer import is_expert_name
from lightning_pmss.layers.guard import refuse_disabled
from lightning_pmss.layers.layout import Layout
from lightning_pmss.layers.matrix_layer import OwnedLinear, holder
from lightning_pmss.layers.parts import clean_name, is_sharded
from lightning_pmss.methods.config import AdapterConfig
from lightning_pmss.methods.method import Factors, Update
from lightning_pmss.store import not_finite
from lightning_pmss.store.shards import ShardReader, few

_IN_PYTHON = "load_adapter(model, ADAPTER_DIR), then the same on the model."
_QUANTISED = "a quantised form, of which no weights can be read. Give the unquantised base."


@dataclass(frozen=True)
class Layer:
    """Shape and rank of a converted layer, without its tensors.

    Attributes:
        shape: (out, in) of W.
        layout: How the base stores W.
        rank: Rank of the update.
        kernel: Shape of a convolution's kernel, ``[in, *sides]``; of other layers empty.
    """

    shape: tuple[int, int]
    layout: Layout
    rank: int
    kernel: tuple[int, ...] = ()


@dataclass(frozen=True)
class Source:
    """An adapter and its base.

    Attributes:
        options: Of the conversion.
        layers: Layers by canonical name.
        update: Function from a layer's name to its update.
        weight: Function from a layer's name to its pristine W, canonical, [out, in]; ValueError for another base.
        also_train: Tensors of the modules trained in full, and fresh tensors.
        tied: Other names of an ``also_train`` tensor.
        modules: Names of the model's modules, as far as they are known.
        double: Whether the update is float64.
        base_model: Id or path of the base.
        revision: Commit of the base.
        model_class: Dotted path of the model's class, if it is known.
        apart: Function from the name of an expert's layer to the shapes of the matrices that the base's files have in its
            place, in the order of its rows, by the names of modules; none of a parameter that the model does not have. None:
            the files keep all experts in one tensor, or are not at hand.
    """

    options: AdapterConfig
    layers: Mapping[str, Layer]
    update: Callable[[str], Update]
    weight: Callable[[str], Tensor]
    also_train: Mapping[str, Tensor]
    tied: Mapping[str, list[str]]
    modules: list[str]
    double: bool
    base_model: str | None
    revision: str | None
    model_class: str | None
    apart: Callable[[str], Mapping[str, tuple[int, int]] | None] = lambda name: None

    @property
    def transposed(self) -> bool:
        """Whether linear layers store W^T; peft knows this of embeddings."""
        return any(layer.layout is Layout.CONV1D for layer in self.layers.values())

    def lora_only(self) -> str | None:
        """A layer that is written as a LoRA or not at all, with the reason; None where there is none."""
        if (found := next(filter(is_expert_name, self.layers), None)) is not None:
            return f"{found} is one of several fused experts, which peft has in no type but LoRA"
        found = next(iter(self.applied()), None)
        return None if found is None else f"{found} is a convolution or an embedding, written for peft as a LoRA only"

    def applied(self) -> list[str]:
        """Names of the convolutions and embeddings."""
        return [n for n, x in self.layers.items() if x.layout in (Layout.CONVOLUTION, Layout.EMBEDDING)]


def model_source(model: nn.Module) -> Source:
    """Make the source of a converted model.

    Args:
        model: Converted.

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
    experts = {n for n in layers if isinstance(modules[n], OwnedLinear)}  # no modules, but parts of one
    own = {id(module) for module in inside.values()}
    outside = [n for n in (*layers, *report.also_train) if n not in experts and inside.get(n) is not modules[n]]
    if outside := [*outside, *(n for n in layers if n in experts and id(holder(modules[n])) not in own)]:
        raise ValueError(
            f"{few(outside)}: outside of the {type(root).__name__}, the model that peft loads a LoRA onto. Use save_adapter."
        )
    fresh = untrained(fresh_tensors(model) if report.fresh is None else report.fresh, report)
    refuse_fresh_layers(fresh, layers)
    extra = tensors_of(report.also_train, modules) | live_tensors(model, fresh)
    numbers = {f"{n}.{part}": t for n, x in layers.items() for part, t in x.update().numbers().items()}
    if broken := not_finite(numbers | extra):
        raise ValueError(
            f"NaN or infinite values in {few(broken)}: the training has diverged, so the adapter is not exported. "
            "Go back to an earlier checkpoint."
        )
    known = base_of(model)
    return Source(
        options=report.config,
        layers={
            n: _layer(layer.update(), canonical_shape(layer), layer.layout, tuple(layer.weight.shape))
            for n, layer in layers.items()
        },
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
    """Make the source of an adapter folder and the base's open shards; weights are read on demand.

    Args:
        adapter: The adapter.
        reader: The base's files.

    Raises:
        ValueError: The adapter's layers are not in the base, have other shapes there, or are quantised.
    """
    rename = resolve_names(adapter, reader, reader.folder, _IN_PYTHON, _QUANTISED)
    refuse_misfits(adapter, reader, rename)
    owners = {key.rpartition(".")[0] for key in reader.tensors}
    modules = {name[:end] for name in owners for end in (*_dots(name), len(name))}
    # Other names of the checkpoint may differ from the model's by a prefix, which their endings do not show.
    beside = {n: fresh for n, fresh in adapter.fresh.items() if n.rpartition(".")[0] not in adapter.modules}
    modules -= {rename(name) for name in adapter.modules}
    modules |= set(adapter.modules)
    return Source(
        options=adapter.options,
        layers={
            n: _layer(m.update, m.shape, m.layout, _stored_shape(n, adapter, reader, rename))
            for n, m in adapter.modules.items()
        },
        update=lambda name: adapter.modules[name].update,
        weight=lambda name: _weight(adapter, reader, rename, name),
        also_train=adapter.also_train | {n: _whole(n, fresh, adapter, reader, rename) for n, fresh in beside.items()},
        tied=adapter.tied,
        modules=sorted(modules),
        double=any(t.dtype == torch.float64 for m in adapter.modules.values() for t in m.update.numbers().values()),
        base_model=adapter.base_model,
        revision=adapter.revision,
        model_class=adapter.model_class,
        apart=lambda name: _apart(name, reader, rename),
    )


def _stored_shape(
    name: str, adapter: AdapterFile, reader: ShardReader, rename: Callable[[str], str]
) -> tuple[int, ...]:
    """The shape of a layer's weight: that of the base's files, or of the adapter's where it is in no file of the base."""
    fresh = adapter.fresh.get(f"{name}.weight")
    return reader.matrices[f"{rename(name)}.weight"].shape if fresh is None else fresh.shape


def _apart(name: str, reader: ShardReader, rename: Callable[[str], str]) -> dict[str, tuple[int, int]] | None:
    stored = rename(name)
    found = reader.experts.get(f"{stored}.weight")
    if found is None:
        return {}
    if found.index is not None:
        return None
    more = stored.removesuffix(name) if stored.endswith(name) else ""  # a prefix that only one side has
    less = name.removesuffix(stored) if name.endswith(stored) else ""
    keys = [(key, less + key.removesuffix(".weight").removeprefix(more)) for key in found.parts]
    return {own: (reader.tensors[key].shape[0], reader.tensors[key].shape[1]) for key, own in keys}


def refuse_fresh_layers(fresh: Iterable[str], layers: Iterable[str]) -> None:
    """Refuse converted layers with fresh weights: the base has no weight that a LoRA could be added to."""
    if own := [name for name in layers if f"{name}.weight" in fresh]:
        raise ValueError(
            f"{few(own)}: the weight is in no file of the base, so a LoRA would have nothing to be added to. Train such layers"
            " in full instead (also_train), or merge: write_merged(model, folder)."
        )


def refuse_parameters(source: Source) -> None:
    """Refuse an export of converted parameters of modules that are no linear layers.

    Raises:
        ValueError: Names one.
    """
    if found := next((name for name, layer in source.layers.items() if layer.layout is Layout.PARAMETER), None):
        raise ValueError(
            f"{found} is a parameter of a module that is no linear layer, and no form of it for peft or vLLM has been tried."
            " Merge instead: `python -m lightning_pmss merge`, or write_merged(model, folder); or train without it."
        )


def _whole(
    name: str, fresh: FreshTensor, adapter: AdapterFile, reader: ShardReader, rename: Callable[[str], str]
) -> Tensor:
    """Return a whole fresh tensor, with its first rows from the base."""
    names = [rename(n) for n in (name, *adapter.tied.get(name, ()))]
    key = next((n for n in names if n in reader.tensors), "")
    if fresh.start and (not key or reader.tensors[key].shape[0] < fresh.start):
        raise ValueError(
            f"{reader.folder} does not have the first {fresh.start} rows of {name}, which the adapter needs from it."
        )
    return fresh.whole(lambda: reader.read(key))


def thin(update: Update, weight: Tensor, name: str, cut: bool = False) -> Factors:
    """Return the update's two thin factors, float64.

    Args:
        update: The update.
        weight: Its W ``[out, in]``.
        name: The layer, for messages.
        cut: Where it has none, return the change itself and an identity.

    Raises:
        ValueError: The update is no product of two thin matrices.
    """
    device = next(iter(update.tensors().values())).device
    if (found := update.factors(weight.to(device), torch.float64)) is not None:
        return found
    if not cut:
        raise ValueError(no_thin_factors(name))
    change = update.delta(weight.to(device), dtype=torch.float64)
    eye = torch.eye(min(change.shape), dtype=change.dtype, device=device)
    return Factors(change, eye) if len(change) == len(eye) else Factors(eye, change)


def no_thin_factors(name: str) -> str:
    """The message for an update that is no LoRA."""
    return (
        f"the update of {name} is no product of two thin matrices, so no LoRA is equal to it. Give a rank, and the nearest LoRA"
        " of that rank is written, with its error in the report; or merge: `python -m lightning_pmss merge`."
    )


def _layer(update: Update, shape: tuple[int, int], layout: Layout, stored: tuple[int, ...]) -> Layer:
    """The change of an update without thin factors can have any rank."""
    low = type(update).factors is not Update.factors
    kernel = stored[1:] if layout is Layout.CONVOLUTION else ()
    return Layer(shape, layout, update.rank if low else min(shape), kernel)


def _weight(adapter: AdapterFile, reader: ShardReader, rename: Callable[[str], str], name: str) -> Tensor:
    weight = base_weight(adapter, reader, rename, name)
    if not adapter.modules[name].is_of(weight):
        refuse_wrong_base(adapter, reader, rename, name)
    return weight


def _dots(name: str) -> list[int]:
    return [position for position, letter in enumerate(name) if letter == "."]
