"""Load several adapters on one base, switch between them, disable them, and delete them."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pmss.conversion.convert import adapted_layers, conversion_of, convert
from lightning_pmss.conversion.converted import converted
from lightning_pmss.conversion.matrices import matrices_beside
from lightning_pmss.conversion.report import ConversionReport
from lightning_pmss.conversion.roots import canonical_modules
from lightning_pmss.conversion.targets import Names
from lightning_pmss.files.adapter import check_also_train, check_base, check_modules, names_in, tensors_of
from lightning_pmss.files.adapter_file import AdapterFile, read_adapter
from lightning_pmss.files.fresh import check_fresh, live_tensors
from lightning_pmss.layers.adapted import AdaptedLinear
from lightning_pmss.layers.convertible import canonical_shape, layout_of
from lightning_pmss.layers.expert_layer import holder, is_expert_name, parameter_name
from lightning_pmss.layers.guard import refuse_disabled
from lightning_pmss.layers.matrix_layer import MatrixLinear
from lightning_pmss.layers.quantised import whole_weight
from lightning_pmss.messages import some
from lightning_pmss.methods import method_of
from lightning_pmss.methods.config import AdapterConfig
from lightning_pmss.methods.given import Given, GivenLayer
from lightning_pmss.methods.method import Kind, Method
from lightning_pmss.named.bank import (
    Bank,
    NamedAdapter,
    attach,
    bank_of,
    fill,
    fill_fresh,
    find_bank,
    put,
    refuse_merged,
    refuse_unknown,
    refuse_used,
    take,
)
from lightning_pmss.store import misfit

_AT_ONCE = "Load all adapters at once into a fresh model: load_adapters(model, {'name': folder, ...})."


def load_adapters(
    model: nn.Module, folders: Mapping[str, str | os.PathLike[str]], *, rank: int | None = None
) -> ConversionReport:
    """Convert a model for several adapters at once and make the first one active.

    Each layer of any adapter is converted, at the largest rank that an adapter has there. Adapters trained in ``rotation``
    coordinates continue in ``orthonormal`` ones.

    Args:
        model: Not converted yet.
        folders: Adapter folders by the names that the adapters shall have.
        rank: The smallest rank of each layer, so that larger adapters can be added or combined later; clipped to each layer.

    Returns:
        The report of the conversion.

    Raises:
        FileNotFoundError: A folder or file is missing.
        ValueError: No folder, a model that is already converted, or an adapter that `load_adapter` would refuse.
    """
    if not folders:
        raise ValueError("no adapters given: load_adapters(model, {'name': folder, ...}).")
    if adapted_layers(model):
        raise ValueError("the model is converted already: add_adapter(model, name, folder), or build a fresh model.")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank={rank!r} is not a rank; type a whole number of at least 1.")
    read = {name: read_adapter(folder) for name, folder in folders.items()}
    _refuse_several_methods(read)
    found = {name: names_in(adapter, model) for name, adapter in read.items()}
    root, *others = sorted({names.root for names in found.values()})
    if others:
        raise ValueError(
            f"these adapters are of several models inside this {type(model).__name__}: {some([root, *others])}."
        )
    layers_of = {name for adapter in read.values() for name in adapter.modules}
    modules = canonical_modules(model, root, layers_of)
    for name, adapter in read.items():
        check_modules(adapter, modules, None, type(model).__name__, matrices_beside(model, list(adapter.modules), root))
        check_fresh(adapter, live_tensors(model, adapter.fresh, root), model)
        check_base(adapter, modules, type(model).__name__)
        check_also_train(adapter, tensors_of(list(found[name].also_train), modules), model)
    _refuse_other_weights(read)
    sizes: dict[str, int] = {}
    for adapter in read.values():
        for name, stored in adapter.modules.items():
            sizes[name] = max(sizes.get(name, 0), rank or 0, stored.update.width)
    kind = method_of(next(iter(read.values())).options)
    sizes = {name: kind.rank_of(canonical_shape(modules[name]), sizes[name]) for name in modules if name in sizes}
    also_train = sorted({module for names in found.values() for module in names.also_train})
    config = _config(next(iter(read.values())).options, sizes, also_train, modules)
    for adapter in read.values():  # before any weight is read: a fresh tensor may be the weight of a converted layer
        fill_fresh(model, adapter.fresh, root)
    states = {
        name: NamedAdapter(_states(adapter, modules, sizes, config), dict(adapter.also_train), dict(adapter.fresh))
        for name, adapter in read.items()
    }
    first: dict[str, dict[str, Tensor]] = {}
    for named in states.values():  # copies, because the live layers keep the tensors that they are made from
        first |= {n: copy.deepcopy(state) for n, state in named.layers.items() if n not in first}
    method = method_of(config)
    given = {n: GivenLayer(_derived(method, canonical_shape(modules[n]), sizes[n], t)) for n, t in first.items()}
    names = Names(root, list(sizes), also_train, sizes)
    report = convert(model, config, given=Given(given, complete=True), names=names)
    base = {key: value.detach().clone() for key, value in tensors_of(report.also_train, modules).items()}
    active = next(iter(states))
    bank = Bank(states, base, active)
    attach(model, bank)
    put(model, bank, active)
    return report


def add_adapter(model: nn.Module, name: str, folder: str | os.PathLike[str]) -> None:
    """Add an adapter from its folder; the active one stays active.

    Args:
        model: Converted by `load_adapters`.
        name: Not in use yet.
        folder: Its layers must be among the converted ones, its ranks no larger than theirs.

    Raises:
        FileNotFoundError: The folder or one of its files is missing.
        ValueError: A name in use, layers or ranks that do not fit, or an adapter that `load_adapter` would refuse.
    """
    bank = bank_of(model)
    refuse_used(bank, name)
    adapter = read_adapter(folder)
    modules, layers = canonical_modules(model), adapted_layers(model)
    if (report := conversion_of(model)) is not None and type(report.config) is not type(adapter.options):
        kinds = adapter.options.label(), report.config.label()
        raise ValueError(f"{adapter.folder} is an adapter of {kinds[0]}, and this model's are of {kinds[1]}.")
    assert report is not None
    if method_of(adapter.options).update_class is not method_of(report.config).update_class:
        raise ValueError(
            f"{adapter.folder} is of another form of {adapter.options.label()} than this model's adapters, whose layers compute"
            " differently. Load it into a model of its own."
        )
    check_modules(adapter, modules, None, type(model).__name__)
    if more := sorted(set(adapter.modules) - set(layers)):
        raise ValueError(f"{adapter.folder} has layers that are not converted: {some(more)}. {_AT_ONCE}")
    sizes = {n: layer.rank for n, layer in layers.items()}
    if wide := [n for n, m in adapter.modules.items() if m.update.width > sizes[n]]:
        ranks = f"{max(adapter.modules[n].update.width for n in wide)}"
        raise ValueError(
            f"{adapter.folder} has a larger rank than {some(wide)} here. {_AT_ONCE} Or give rank={ranks} there."
        )
    if strange := sorted(set(adapter.also_train) - set(bank.base)):
        raise ValueError(f"{adapter.folder} has {some(strange)} trained in full, which no adapter here has. {_AT_ONCE}")
    check_fresh(adapter, live_tensors(model, adapter.fresh), model)
    check_base(adapter, modules, type(model).__name__)
    for key, value in adapter.also_train.items():
        if value.shape != bank.base[key].shape:
            raise ValueError(f"{adapter.folder}: {key} is {list(value.shape)}, here {list(bank.base[key].shape)}.")
        if reason := misfit(value, bank.base[key].dtype):
            raise ValueError(f"{adapter.folder}: {key} {reason}. Use an earlier adapter.")
    bank.adapters[name] = NamedAdapter(
        _states(adapter, modules, sizes, report.config), dict(adapter.also_train), dict(adapter.fresh)
    )


def set_adapter(model: nn.Module, name: str) -> None:
    """Make an adapter the active one; the trained values of the previous one are kept under its name.

    Only the values of small tensors change, so a compiled model is not compiled again. Where adapters of other ranks cannot be
    filled up (MiSS, BAT), the shapes change too, and it is. An optimizer's state belongs to the adapter it was made for.

    Raises:
        ValueError: An unknown name, or a merged model.
    """
    bank = bank_of(model)
    refuse_unknown(bank, name)
    refuse_merged(model)
    refuse_disabled(adapted_layers(model).values(), "set or combined")
    take(model, bank)
    put(model, bank, name)


def active_adapter(model: nn.Module) -> str:
    """Return the name of the active adapter."""
    return bank_of(model).active


def adapter_names(model: nn.Module) -> list[str]:
    """Return the names of all adapters."""
    return list(bank_of(model).adapters)


def delete_adapter(model: nn.Module, name: str) -> None:
    """Delete an adapter, which must not be the active one.

    Raises:
        ValueError: An unknown name, or the active adapter's.
    """
    bank = bank_of(model)
    refuse_unknown(bank, name)
    if name == bank.active:
        raise ValueError(f"{name!r} is the active adapter; call set_adapter(model, ...) with another one first.")
    del bank.adapters[name]


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Run a block with the base alone, bit for bit: ``with disable_adapter(model): ...``.

    The layers compute as in the base, and modules trained in full have the base's values; state dicts still contain the
    trained ones. Any converted model will do, except that one with modules trained in full must come from `load_adapters`,
    which keeps the base's values.

    Raises:
        ValueError: No converted layer, a merged model, or modules trained in full whose base values were not kept.
    """
    if not adapted_layers(model):
        raise ValueError(f"{type(model).__name__} has no converted layer, so there is no adapter to disable.")
    report, layers = converted(model, "disable the adapters of")
    refuse_merged(model)
    bank = find_bank(model)
    if bank is None and report.also_train:
        raise ValueError(
            f"{some(report.also_train)} were trained in full, and the base's values are not kept. Load the adapter by"
            " load_adapters(model, {'name': folder}), which keeps them."
        )
    if any(layer.disabled for layer in layers.values()):  # nested block
        yield
        return
    modules = canonical_modules(model)
    with ExitStack() as stack:
        for name in report.also_train:
            stack.enter_context(_holding_base(modules[name], name, {} if bank is None else bank.base))
        try:
            for layer in layers.values():
                layer.disabled = holder(layer).disabled = True  # type: ignore[assignment]
            yield
        finally:
            for layer in layers.values():
                layer.disabled = holder(layer).disabled = False  # type: ignore[assignment]


@contextmanager
def _holding_base(module: nn.Module, name: str, base: Mapping[str, Tensor]) -> Iterator[None]:
    """Give a module trained in full the base's values; state dicts still save and load the trained ones."""
    keys = {key: f"{name}.{key}" for key, value in module.state_dict().items() if isinstance(value, Tensor)}

    def live() -> dict[str, Tensor]:
        own = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
        return {full: own[key].detach() for key, full in keys.items()}

    trained = {key: value.clone() for key, value in live().items()}

    def save(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        state.update({f"{prefix}{key}": trained[full] for key, full in keys.items()})

    def before_load(*args: Any) -> None:
        fill(live(), trained)

    def after_load(*args: Any) -> None:
        trained.update({key: value.clone() for key, value in live().items()})
        fill(live(), base)

    handles = [
        module.register_state_dict_post_hook(save),
        module.register_load_state_dict_pre_hook(before_load),
        module.register_load_state_dict_post_hook(after_load),
    ]
    fill(live(), base)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        fill(live(), trained)


def _refuse_other_weights(read: Mapping[str, AdapterFile]) -> None:
    """Refuse adapters that come with different freshly initialised weights of one converted layer."""
    found: dict[str, torch.Tensor] = {}
    for name, adapter in read.items():
        for layer in adapter.modules:
            own = adapter.fresh.get(f"{layer}.weight")
            if own is not None and not torch.equal(found.setdefault(layer, own.value), own.value):
                raise ValueError(
                    f"{name!r} was trained on another freshly initialised weight of `{layer}` than the others."
                )


def _config(
    first: AdapterConfig, sizes: Mapping[str, int], also_train: list[str], modules: Mapping[str, nn.Module]
) -> AdapterConfig:
    """Restrict the first adapter's options to exactly these layers and ranks."""
    named = {parameter_name(name) if is_expert_name(name) else name: size for name, size in sizes.items()}
    parameters = {name for name in sizes if is_expert_name(name) or isinstance(modules[name], MatrixLinear)}
    alone = [name for name in sizes if name not in parameters]
    owned = dict.fromkeys(
        parameter_name(name) if is_expert_name(name) else name for name in sizes if name in parameters
    )
    return replace(
        method_of(first).for_several(),
        target_modules="|".join(_exactly(name) for name in alone) if alone else (),
        exclude_modules=(),
        target_parameters="|".join(_exactly(name) for name in owned) if owned else (),
        rank=max(sizes.values()),
        rank_pattern={_exactly(name): size for name, size in named.items()},
        also_train="|".join(_exactly(name) for name in also_train) if also_train else (),
    )


def _exactly(name: str) -> str:
    """Return a regular expression for this full name; the name alone would also match as an ending."""
    return f"({re.escape(name)})"


@torch.no_grad()
def _states(
    adapter: AdapterFile, modules: Mapping[str, nn.Module], sizes: Mapping[str, int], config: AdapterConfig
) -> dict[str, dict[str, Tensor]]:
    method, states = method_of(config), {}
    for name, stored in adapter.modules.items():
        layer = modules[name]
        if isinstance(layer, AdaptedLinear):
            weight = layer.base_weight()
        else:
            with whole_weight(layer) as found:
                weight = layout_of(layer).canonical(found)
        scale = config.scale_of(sizes[name], stored.shape)
        states[name] = method.fitted(weight, stored.update, sizes[name], scale, name)
    return states


def _derived(
    method: Method[Any], shape: tuple[int, int], rank: int, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return those of a layer's tensors that are not trained."""
    specs = method.specs(shape, rank)
    return {name: tensor for name, tensor in tensors.items() if specs[name].kind is not Kind.TRAINED}


def _refuse_several_methods(read: Mapping[str, AdapterFile]) -> None:
    methods = {adapter.options.label() for adapter in read.values()}
    if len(methods) > 1:
        raise ValueError(
            f"these adapters are of several methods ({', '.join(sorted(methods))}); load those of one method at a time."
        )
    forms = {method_of(adapter.options).update_class: name for name, adapter in read.items()}
    if len(forms) > 1:
        raise ValueError(
            f"the adapters {some(sorted(forms.values()))} are of several forms of {methods.pop()}, whose layers compute"
            " differently; load those of one form at a time."
        )
