"""Save and load the adapter of a model; `adapter_file` describes the format."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pmss.conversion.convert import adapted_layers, conversion_of, convert
from lightning_pmss.conversion.converted import converted
from lightning_pmss.conversion.experts import matrices_in
from lightning_pmss.conversion.matrices import matrices_beside
from lightning_pmss.conversion.report import ConversionReport
from lightning_pmss.conversion.roots import adapted_root, below, canonical_modules, choose_root, noted_root
from lightning_pmss.conversion.targets import Names
from lightning_pmss.distributed.gathering import whole_tensors, whole_updates
from lightning_pmss.files.adapter_file import AdapterFile, AdapterModule, read_adapter, write_adapter
from lightning_pmss.files.adapter_fit import check_modules as check_modules
from lightning_pmss.files.base import Base, base_of
from lightning_pmss.files.fresh import (
    check_fresh,
    fresh_tensors,
    live_tensors,
    new_rows,
    other_size,
    settings_of,
    state_keys,
    to_be_kept,
    untrained,
)
from lightning_pmss.files.plain import quantisation_settings
from lightning_pmss.layers.adapted import AdaptedLinear
from lightning_pmss.layers.convertible import canonical_shape, is_linear, layout_of
from lightning_pmss.layers.expert_layer import label
from lightning_pmss.layers.fingerprint import fingerprint
from lightning_pmss.layers.guard import refuse_disabled
from lightning_pmss.layers.parts import clean_name, clean_state, is_sharded
from lightning_pmss.layers.quantised import quantisation_of, whole_weight
from lightning_pmss.methods import method_of
from lightning_pmss.methods.given import Given, GivenLayer
from lightning_pmss.store import misfit
from lightning_pmss.store.atomic import check_target
from lightning_pmss.store.kinds import ADAPTER
from lightning_pmss.store.shards import few

_LARGEST = torch.finfo(torch.float32).max
__all__ = ["AdapterFile", "AdapterModule", "load_adapter", "read_adapter", "save_adapter"]


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    base: str | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    run: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    keep_tokenizer: bool = False,
) -> Path:
    """Write the adapter of a converted model, and a model card. Call it on every rank of a sharded model; rank 0 writes.

    The file also contains frozen tensors that no file of the base contains: a fresh head, the rows of added tokens.

    Args:
        model: Converted by `convert` or the callback; merged or not.
        folder: Written whole or not at all.
        base: Id or path of the base model; default: the Hugging Face model's ``name_or_path``.
        revision: Commit of the base; default: the commit in the model's config or in the hub's cache.
        overwrite: Replace an earlier adapter of this library.
        run: Facts about the training, for the card: section -> text, or name -> number or text.
        tokenizer: Object with ``save_pretrained``, or a list of such; saved with the adapter if tokens were added to the
            base's, or `keep_tokenizer` says so.
        keep_tokenizer: Save it though no tokens were added, such as for a chat template that the base does not have.

    Returns:
        The folder.

    Raises:
        FileExistsError: See `atomic_folder`.
        ValueError: Not a converted model, a disabled adapter, or NaN or infinite trained values.
    """
    target = Path(folder).expanduser()
    check_target(target, ADAPTER, overwrite=overwrite)
    report, layers = converted(model, "save")
    refuse_disabled(layers.values(), "saved")

    modules = {}
    for name, update in whole_updates(model, layers):
        layer = layers[name]
        modules[name] = AdapterModule(
            shape=canonical_shape(layer),
            layout=layer.layout,
            fingerprint=dict(layer.fingerprint or fingerprint(*layer.reads())),
            update=update.stored(),
        )
    named = canonical_modules(model)
    sharded = is_sharded(model)
    found = fresh_tensors(model) if report.fresh is None else report.fresh
    fresh, grown = untrained(found, report), any(found.values())
    if sharded:
        full = {id(module): clean_name(name) for name, module in model.named_modules()}
        places = {full[id(named[name])]: name for name in report.also_train}
        extra: dict[str, Tensor] = {}
        values: dict[str, Tensor] = {}
        frozen = state_keys(model, fresh)
        for key, value in whole_tensors(model, under=[*places, *frozen]):
            if key in frozen:
                values[frozen[key]] = value
            extra |= {n + key.removeprefix(place): value for place, n in places.items() if key.startswith(f"{place}.")}
    else:
        extra, values = tensors_of(report.also_train, named), live_tensors(model, fresh)
    tied = other_names(extra | values, model)
    if sharded and torch.distributed.get_rank() != 0:
        return target
    root = adapted_root(model)[0]
    known = base_of(model)
    if base not in (None, known.name):
        known = Base(base)
    adapter = AdapterFile(
        folder=target,
        options=report.config,
        base_model=known.name,
        revision=revision or known.revision,
        modules=modules,
        model_class=class_path(root),
        also_train={key: value.detach().cpu() for key, value in extra.items()},
        tied=tied,
        quantisation=sorted(q for q in {quantisation_of(m, m.pristine) for m in layers.values()} if q),
        quantisation_settings=quantisation_settings(root),
        root=noted_root(model),
        left_out=linear_left_out(model),
        fresh=to_be_kept(model, values, fresh),
        settings=settings_of(model, found),
    )
    kept = tokenizer if grown or keep_tokenizer else None
    write_adapter(adapter, target, overwrite=overwrite, run=run, base=known.folder, tokenizer=kept)
    return target


def load_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> ConversionReport:
    """Load an adapter, to continue training or for inference.

    A model that is not converted is converted with the stored config and indices: exactly the layers that the file names,
    also if they are frozen or in eval mode. In a model that is converted already, to the same layers and indices, only the
    trained tensors are set; its own scale, coordinates and dropout stay. The model is changed only after every check has
    passed.

    Returns:
        The report of the conversion.

    Raises:
        FileNotFoundError: Folder or file missing.
        ValueError: A damaged, incomplete or foreign file, another base, or a model that is merged or converted
            differently. The message names file and modules.
    """
    adapter = read_adapter(folder)
    report = conversion_of(model)
    refuse_disabled(adapted_layers(model).values(), "loaded")
    names = None if report is not None else names_in(adapter, model)
    modules = canonical_modules(model, None if names is None else names.root, adapter.modules.keys())
    if merged := [name for name, layer in adapted_layers(model).items() if layer.merged]:
        raise ValueError(f"{few(merged, 3)}: the model is merged. Call unmerge(model), then load {adapter.folder}.")
    also_train = report.also_train if names is None else list(names.also_train)  # type: ignore[union-attr]
    beside = [] if names is None else matrices_beside(model, list(adapter.modules), names.root)
    check_modules(
        adapter, modules, None if report is None else set(adapted_layers(model)), type(model).__name__, beside
    )
    live = live_tensors(model, adapter.fresh, None if names is None else names.root)
    check_fresh(adapter, live, model)
    check_base(adapter, modules, type(model).__name__)
    places = tensors_of(also_train, modules)
    check_also_train(adapter, places, model)
    fresh = fresh_tensors(model, None if names is None else names.root)
    warn_about_random(adapter, fresh)

    with torch.no_grad():  # before the conversion: a fresh tensor may be the weight of a layer to convert
        for name, place in new_rows(live, adapter.fresh).items():
            place.copy_(adapter.fresh[name].value)
    if report is None:
        method = method_of(adapter.options)
        layers = {n: GivenLayer(method.given_by(m.update, m.shape)) for n, m in adapter.modules.items()}
        given = Given(layers, source=str(adapter.folder))
        updates = {n: m.update for n, m in adapter.modules.items()}
        report = convert(model, adapter.options, given=given, updates=updates, names=names)
    else:
        converted = adapted_layers(model)
        own = {n: adapter.modules[n].update.to(x.weight.device) for n, x in converted.items()}
        numbers = {n: layer.numbers_of(own[n], n) for n, layer in converted.items()}
        for name, layer in converted.items():
            layer.set_numbers(numbers[name])
    with torch.no_grad():
        for key, place in places.items():
            place.copy_(adapter.also_train[key])
    report.fresh = fresh
    return report


def linear_left_out(model: nn.Module) -> list[str]:
    """Names of linear layers and parameters of experts that are not converted, and of other parameters of converted kinds.

    The file records them to know the architecture.
    """
    modules = canonical_modules(model)
    left = ((n, m) for n, m in modules.items() if is_linear(m) and not isinstance(m, AdaptedLinear))
    return list(
        dict.fromkeys([*(label(n, m) for n, m in left), *matrices_beside(model, list(matrices_in(modules, modules)))])
    )


def names_in(adapter: AdapterFile, model: nn.Module) -> Names:
    """Find the adapter's root, layers and modules trained in full in a model that is not converted."""
    known = {clean_name(name) for name, _ in model.named_modules()}
    wanted = adapter.options.root if adapter.options.root in known else None
    root = adapter.root if adapter.root is not None and adapter.root in known else choose_root(model, wanted)
    modules = canonical_modules(model, root)
    if converted := [name for name, module in modules.items() if isinstance(module, AdaptedLinear)]:
        raise ValueError(f"{few(converted, 3)}: converted already. Load {adapter.folder} into a fresh model.")
    stored = set(adapter.also_train)
    owners = {name.rpartition(".")[0] for name in stored} & set(modules)
    while parents := {
        p for o in owners if (p := o.rpartition(".")[0]) and p not in owners and _all_of(p, modules) <= stored
    }:
        owners |= parents
    return Names(
        root,
        list(adapter.modules),
        sorted(o for o in owners if not below(o.rpartition(".")[0], list(owners))),
        {name: stored.update.rank for name, stored in adapter.modules.items()},
    )


def _all_of(name: str, modules: Mapping[str, nn.Module]) -> set[str]:
    """Keys of a module's state dict, under its canonical name."""
    return set(tensors_of([name], modules))


def check_base(adapter: AdapterFile, modules: Mapping[str, nn.Module], model: str) -> None:
    """Refuse a base whose weights are not those that the adapter was made with, and an update that would overflow."""
    wrong, large = [], []
    for name, stored in adapter.modules.items():
        layer, own = modules[name], adapter.fresh_weight(name)
        with ExitStack() as stack:
            if own is not None and not isinstance(
                layer, AdaptedLinear
            ):  # this weight, or its last rows, are the adapter's
                weight = stored.canonical(own.whole(lambda layer=layer: layer.weight.detach()))  # type: ignore[misc]
            else:
                live: Tensor = layer.weight  # type: ignore[assignment]
                if live.is_meta:
                    raise ValueError(f"{name} is on the meta device; load the base's weights before {adapter.folder}.")
                if isinstance(layer, AdaptedLinear):
                    found = stack.enter_context(whole_weight(layer, layer.stored_weight))
                else:
                    found = stack.enter_context(whole_weight(layer))
                weight = layout_of(layer).canonical(found)
            if not stored.is_of(weight):
                wrong.append(name)
            elif not stored.update.to(weight.device).bound(weight) <= _LARGEST:
                large.append(name)
    if wrong:
        raise ValueError(adapter.wrong_base(wrong, f"the given {model}"))
    if large:
        raise ValueError(
            f"{adapter.folder}: the update of {few(large)} is too large to compute with. Use an earlier adapter or checkpoint."
        )


def check_also_train(adapter: AdapterFile, places: Mapping[str, Tensor], model: nn.Module) -> None:
    """Refuse a model whose modules trained in full have other tensors or shapes than the adapter's."""
    lost, foreign = sorted(set(places) - set(adapter.also_train)), sorted(set(adapter.also_train) - set(places))
    if lost or foreign:
        says = [f"lacks {few(lost)}"] if lost else []
        says += [f"has {few(foreign)}, which the model does not have or does not train in full"] if foreign else []
        raise ValueError(f"{adapter.folder} {' and '.join(says)}. Load it into the architecture it was trained on.")
    for key, place in places.items():
        stored = adapter.also_train[key]
        if reason := misfit(stored, place.dtype):
            raise ValueError(f"{adapter.folder}: {key} {reason}. Load it into the architecture it was trained on.")
        if place.shape != stored.shape:
            raise ValueError(other_size(adapter, key, stored.shape, place.shape, model))


def warn_about_random(adapter: AdapterFile, fresh: Mapping[str, int]) -> None:
    """Warn of tensors that are neither in the base's files nor in the adapter, so that their values are random."""
    held = adapter.also_train.keys() | adapter.fresh.keys()
    if missing := [name for name in fresh if name not in held and name.rpartition(".")[0] not in adapter.modules]:
        warnings.warn(
            f"{few(missing)}: neither in the files of the base nor in {adapter.folder}, so this model has random values instead"
            " of those that the adapter was trained with. Train it again with their module in also_train.",
            stacklevel=3,
        )


def tensors_of(names: list[str], modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return the live parameters and persistent buffers of the named modules, by canonical name."""
    return {
        f"{name}.{key}": value
        for name in names
        for key, value in clean_state(modules[name]).items()
        if isinstance(value, Tensor)
    }


def other_names(extra: Mapping[str, Tensor], model: nn.Module) -> dict[str, list[str]]:
    """Return the other names of each tied tensor: a checkpoint stores it under only one of them."""
    prefix = adapted_root(model)[1]
    if is_sharded(model):
        return {key: _aliases(key, model, prefix) for key in extra}
    by_address: dict[tuple[int, int], list[str]] = {}
    for key, value in clean_state(model).items():
        if isinstance(value, Tensor) and value.numel():
            by_address.setdefault((value.data_ptr(), value.numel()), []).append(key.removeprefix(prefix))
    return {
        key: [name for name in by_address.get((value.data_ptr(), value.numel()), []) if name != key]
        for key, value in extra.items()
    }


def class_path(model: nn.Module) -> str:
    """Dotted path of a model's class, from which an export derives peft's task type."""
    return f"{type(model).__module__}.{type(model).__qualname__}"


def _aliases(key: str, model: nn.Module, prefix: str) -> list[str]:
    """Return the other names in a sharded model by object identity: addresses of shards do not show what is tied."""
    live = {clean_name(n).removeprefix(prefix): p for n, p in model.named_parameters(remove_duplicate=False)}
    return [name for name, parameter in live.items() if name != key and parameter is live.get(key)]
