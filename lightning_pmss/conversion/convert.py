"""Find the target layers of a model, convert them in place, freeze the rest, and report what was done."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lightning_pmss.conversion.converted import adapted_layers as adapted_layers
from lightning_pmss.conversion.converted import changed_fields, is_complete, layers_to_keep, record
from lightning_pmss.conversion.converted import conversion_of as conversion_of
from lightning_pmss.conversion.experts import experts_by_parameter, without_experts
from lightning_pmss.conversion.left_out import LeftOut
from lightning_pmss.conversion.matrices import modules_for
from lightning_pmss.conversion.report import ConversionReport, LayerReport
from lightning_pmss.conversion.roots import (
    adapted_root,
    canonical_modules,
    canonical_owners,
    choose_root,
    hugging_face_models,
    settle_root,
)
from lightning_pmss.conversion.targets import (
    Names,
    find_targets,
    match_modules,
    named_targets,
    ranks_of,
)
from lightning_pmss.conversion.unconvertible import refuse_unconvertible
from lightning_pmss.layers.adapted import AdaptedLinear
from lightning_pmss.layers.adapter import FrozenTensors
from lightning_pmss.layers.convertible import canonical_shape, kept_shape, layout_of
from lightning_pmss.layers.expert_layer import ExpertLinear, one_by_one
from lightning_pmss.layers.experts import adopt_experts
from lightning_pmss.layers.fingerprint import same_base
from lightning_pmss.layers.matrices import adopt_matrix
from lightning_pmss.layers.matrix_layer import MatrixLinear
from lightning_pmss.layers.merged_layer import Mergeable
from lightning_pmss.layers.parts import clean_name, outside_zero_init, whole_size
from lightning_pmss.layers.products import core_dtype
from lightning_pmss.layers.quantised import hidden_values, prepare, quantisation_of, value_dtype, whole_weight
from lightning_pmss.messages import some
from lightning_pmss.methods import method_of
from lightning_pmss.methods.config import AdapterConfig
from lightning_pmss.methods.given import Given, GivenLayer
from lightning_pmss.methods.method import Kind, Method, Update, file_bytes
from lightning_pmss.methods.pmss.rounding import LOW_PRECISION
from lightning_pmss.store import why_no_index


def convert(
    model: nn.Module,
    config: AdapterConfig,
    *,
    given: Given | None = None,
    updates: Mapping[str, Update] | None = None,
    compute_dtype: torch.dtype | None = None,
    names: Names | None = None,
) -> ConversionReport:
    """Convert the targeted linear layers of a model in place and freeze everything but the adapter and ``also_train``.

    All checks and computations come before the first change, so an error leaves the model as it was. Submodules that were
    converted separately with the same config keep their trained tensors.

    Args:
        model: Any module. Names are relative to ``config.root``, else to the Hugging Face model inside it, if exactly one is
            not frozen and in eval mode as a whole.
        config: The method and its options.
        given: Frozen and index tensors per module, used instead of deriving them (as when an adapter is loaded).
        updates: Updates per module to start from; default: the method's own start.
        compute_dtype: Dtype in which the layers compute under autocast; default: the dtype of their weights.
        names: Names and ranks of the layers to convert, used instead of the config's patterns.

    Returns:
        The report. A second call with an equal config changes nothing and returns the report of the first.

    Raises:
        ValueError: A pattern matches nothing, a matched layer cannot be converted (unsupported type, tied weight, meta
            tensor without a skeleton, already sharded, computed without its ``forward``, weights so small or large that an
            update leaves the range of the dtype), the model was converted with another config, or the coordinates
            cannot represent an update.
    """
    method = method_of(config)
    root = None if config.root is None or names is not None else choose_root(model, config.root)
    if (done := conversion_of(model, root)) is not None:
        changed = changed_fields(done.config, config, inside=adapted_root(model, root)[0] is model)
        if changed or given is not None:
            what = f"another config (differs in {', '.join(changed)})" if changed else "its own selection"
            raise ValueError(f"the model is already converted with {what}; build a fresh model and convert that one.")
        if is_complete(model, done, root):
            settle_root(model, adapted_root(model, root)[1].removesuffix("."))
            return done
    root = choose_root(model, config.root) if names is None else names.root
    modules = modules_for(model, config, root) if names is None else canonical_modules(model, root, set(names.targets))
    selected = given is None  # rows and columns are the config's own, computed now or read from its skeleton file
    if given is None:
        given = method.read_given()
    if names is None:
        owners = canonical_owners(model, root)
        also_train = match_modules(config.also_train, without_experts(modules), "also_train", owners=owners)
        targets, left_out = find_targets(model, config, modules, also_train, root)
        ranks = ranks_of(config, targets, modules)
    else:
        assert given is not None
        also_train = list(names.also_train)
        targets, left_out = named_targets(model, names, modules)
        ranks = dict(names.ranks)
    kept = layers_to_keep(model, config, modules, ranks, left_out)
    fresh = [name for name in targets if name not in kept]
    if done is not None and not fresh:
        settle_root(model, root)
        return done
    refuse_unconvertible(fresh, modules, method, given)

    prepare(model)
    with outside_zero_init():
        plans = dict(_plan(fresh, modules, method, given, ranks, compute_dtype, selected))
        starts = {name: _start(plans[name], modules[name], method, name, updates) for name in fresh}
        for name, plan in plans.items():
            found, scale = modules[name], config.scale_of(plan.rank, plan.shape)
            if isinstance(found, MatrixLinear):
                adopt_matrix(found, method, plan.rank, starts[name], plan.tensors, scale)
            elif not isinstance(found, ExpertLinear):
                AdaptedLinear.adopt(found, method, plan.rank, starts[name], plan.tensors, scale)
        for group in experts_by_parameter(fresh, modules).values():
            first, layers_of = plans[group[0]], [modules[name] for name in group]
            scale = config.scale_of(first.rank, first.shape)
            tensors = [plans[name].tensors for name in group]
            adopt_experts(layers_of, method, first.rank, [starts[name] for name in group], tensors, scale)  # type: ignore[arg-type]
        for name, plan in plans.items():
            layer: AdaptedLinear = modules[name]  # type: ignore[assignment]
            layer.fingerprint = plan.fingerprint
            layer.derived_dtype = None if given is not None and given.complete else value_dtype(layer)
        layers = kept | {name: _report(modules[name], ranks[name], plan) for name, plan in plans.items()}
    notes = [*_leave_fast_paths(model), *_several(model, root, left_out, modules)]
    model.requires_grad_(False)
    for name in targets:
        for parameter in modules[name].core.parameters(recurse=False):  # type: ignore[union-attr, operator]
            parameter.requires_grad_(True)
    for name in also_train:
        modules[name].requires_grad_(True)
    done = ConversionReport(
        config=config,
        layers=[layers[name] for name in targets],
        left_out=left_out.reasons,
        also_train=sorted(also_train),
        trainable=sum(whole_size(p) for p in model.parameters() if p.requires_grad),
        total=sum(whole_size(p) for p in _without_frozen(model)) + hidden_values(model),
        also_train_bytes=sum(t.nbytes for name in also_train for t in modules[name].state_dict().values()),
        notes=notes,
        unowned=left_out.unowned,
        asleep=left_out.asleep,
        children=_children(model, targets, modules),
    )
    done.shares = _shares(model, list(left_out.reasons), root, done.total)
    low = {str(d).removeprefix("torch.") for name in plans if (d := value_dtype(modules[name])) in LOW_PRECISION}  # type: ignore[arg-type]
    if low and (warning := done.rounding_warning(" and ".join(sorted(low)))):
        warnings.warn(warning, stacklevel=2)
    if warning := done.unowned_warning():
        warnings.warn(warning, stacklevel=2)
    settle_root(model, root)
    record(model, done)
    return done


@dataclass(frozen=True)
class _Plan:
    """Tensors and figures of a layer, computed before the layer is converted.

    Attributes:
        name: Canonical module name.
        rank: Rank after clipping.
        shape: (out, in) of W.
        tensors: Frozen and index tensors.
        fingerprint: Fingerprint from a file; None without one.
        figures: Fields of `LayerReport` that the method computes.
    """

    name: str
    rank: int
    shape: tuple[int, int]
    tensors: Mapping[str, Tensor]
    fingerprint: Mapping[str, str] | None
    figures: Mapping[str, Any]


def _plan(
    targets: list[str],
    modules: Mapping[str, nn.Module],
    method: Method[Any],
    given: Given | None,
    ranks: Mapping[str, int],
    compute_dtype: torch.dtype | None,
    selected: bool,
) -> Iterator[tuple[str, _Plan]]:
    """Compute the frozen and index tensors of every target, without any change; a collective where weights are sharded."""
    strangers = []
    others = (
        torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank() > 0
    )
    # disable=None: tqdm shows no bar where the output is not a terminal.
    shown = tqdm(targets, desc=method.doing, unit="layer", disable=True if others else None)
    for name, layer in one_by_one((name, modules[name]) for name in shown):
        shape = canonical_shape(layer)
        rank = method.rank_of(shape, ranks[name])
        known = GivenLayer() if given is None else given.layers[name]
        if given is not None:
            _check_given(known, method, shape, rank, name, given.source)
        with whole_weight(layer) if not layer.weight.is_meta else nullcontext() as weight:  # type: ignore[union-attr]
            weight = None if weight is None else layout_of(layer).canonical(weight)
            own = dict(known.tensors) if weight is None else {n: t.to(weight.device) for n, t in known.tensors.items()}
            proven = weight is None or known.fingerprint is None
            if not proven and not same_base(known.fingerprint or {}, *method.update_class.reads(weight, own)):  # type: ignore[arg-type]
                strangers.append(name)
                continue
            tensors = method.derive(weight, rank, name, own)
            dtype = value_dtype(layer)
            if weight is not None and selected:
                scale = method.config.scale_of(rank, shape)
                if reason := method.why_untrainable(weight, tensors, scale, compute_dtype or dtype):
                    raise ValueError(f"`{name}` {reason}")
            figures = method.figures(weight, tensors, dtype) | dict(known.figures)
        kept = {n: known.tensors.get(n, t) for n, t in tensors.items()}
        yield name, _Plan(name, rank, shape, kept, known.fingerprint, figures)
    if strangers and given is not None:
        remedy = "Make a new one with `python -m lightning_pmss select --model <this base>`."
        if kind := quantisation_of(modules[strangers[0]]):
            remedy = f"These weights are quantised ({kind}); skeleton files are for weights as stored: leave skeleton_file out."
        raise ValueError(
            f"{given.source} belongs to another base model: the weights of {some(strangers)} are not those it was made"
            f" from. {remedy}"
        )


def _start(
    plan: _Plan, layer: nn.Module, method: Method[Any], name: str, updates: Mapping[str, Update] | None
) -> dict[str, Tensor]:
    """Initial values of the layer's trained tensors."""
    if updates is None or name not in updates:
        return method.start(plan.shape, plan.rank, name)
    weight: Tensor = layer.weight  # type: ignore[assignment]
    update = updates[name].to(weight.device)
    dtype = core_dtype(weight.dtype)
    frozen = {n: t.to(weight.device, dtype) for n, t in plan.tensors.items() if t.is_floating_point()}
    numbers = method.numbers(update, frozen, method.config.scale_of(plan.rank, plan.shape), name)
    return {n: value.to(dtype) for n, value in numbers.items()}


def _report(layer: nn.Module, requested: int, plan: _Plan) -> LayerReport:
    assert isinstance(layer, AdaptedLinear)
    per_token = layer.method.kept_per_token(kept_shape(layer), layer.rank) * value_dtype(layer).itemsize
    return LayerReport(
        name=plan.name,
        shape=plan.shape,
        rank=layer.rank,
        requested_rank=requested,
        trainable=sum(whole_size(t) for t in layer.core.trained().values()),
        kept_bytes_per_token=0
        if isinstance(layer, MatrixLinear)
        else per_token,  # W' itself, however many tokens there are
        file_bytes=file_bytes(layer.method, plan.shape, layer.rank, core_dtype(layer.weight.dtype)),
        edit=getattr(layer, "edit", ""),
        **plan.figures,
    )


def _without_frozen(model: nn.Module) -> Iterator[nn.Parameter]:
    """The model's parameters, each once, without those that a method derived from its weights."""
    ours = {id(p) for m in model.modules() if isinstance(m, FrozenTensors) for p in m.parameters()}
    return (p for p in model.parameters() if id(p) not in ours)


def _children(model: nn.Module, targets: Sequence[str], modules: Mapping[str, nn.Module]) -> dict[str, int]:
    """Number of targets by top-level child of the model."""
    counts = Counter(id(getattr(modules[name], "owner", modules[name])) for name in targets)
    found: Counter[str] = Counter()
    for name, module in model.named_modules():
        if id(module) in counts:
            found[clean_name(name).split(".")[0]] += counts[id(module)]
    return dict(found)


def _shares(model: nn.Module, names: Sequence[str], root: str, total: int) -> dict[str, float]:
    """Share of the model's parameters, 0 to 1, by name of module or parameter."""
    shares = dict.fromkeys(names, 0.0)
    for name, module in canonical_owners(model, root):
        if name in shares:
            shares[name] = (sum(whole_size(p) for p in module.parameters()) + hidden_values(module)) / total
        for key, parameter in module._parameters.items():
            full = f"{name}.{key}".lstrip(".")
            if parameter is not None and full in shares:
                shares[full] = whole_size(parameter) / total
    return shares


def _several(model: nn.Module, root: str, left_out: LeftOut, modules: Mapping[str, nn.Module]) -> list[str]:
    """Note for the report where several Hugging Face models were converted together."""
    asleep = {id(m) for name in left_out.asleep for m in modules[name].modules()}
    awake = [m for m in hugging_face_models(model) if id(m) not in asleep]
    if root or len(awake) < 2:
        return []
    names = {id(m): clean_name(name) for name, m in model.named_modules()}
    return [
        f"{some([names[id(m)] for m in awake])} are separate Hugging Face models: root={names[id(awake[0])]!r} limits"
        " conversion, adapter and merged model to that one"
    ]


def _leave_fast_paths(model: nn.Module) -> list[str]:
    """Switch off torch's fused encoder kernel, which would evaluate converted layers without their update."""
    notes = []
    for name, module in model.named_modules():
        if not any(isinstance(m, Mergeable) for m in module.modules()):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # torch's own switch: without a known activation the plain path runs
            notes.append(
                f"`{clean_name(name)}`: the fused inference path of nn.TransformerEncoderLayer reads weights directly: off"
            )
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
    return notes


def _check_given(
    given: GivenLayer, method: Method[Any], shape: tuple[int, int], rank: int, name: str, source: str
) -> None:
    if given.shape is not None and given.shape != shape:
        raise ValueError(
            f"{source}: `{name}` has the shape {given.shape} there and {shape} in this model: another base."
        )
    for part, spec in method.specs(shape, rank).items():
        if spec.kind is Kind.TRAINED or part not in given.tensors:
            continue
        index = given.tensors[part]
        if spec.kind is Kind.FROZEN:
            if index.dim() == len(spec.shape) and tuple(index.shape) != spec.shape:
                raise ValueError(
                    f"{source}: the {part} of `{name}` is {list(index.shape)}, and rank {rank} of this run needs"
                    f" {list(spec.shape)}; type the rank of the file (or its entry in rank_pattern), or make one of that rank."
                )
            continue
        if why_no_index(index, spec.below):
            raise ValueError(
                f"{source}: the {part} of `{name}` are not distinct indices below {spec.below}; the file is for another model."
            )
        if len(index) != rank:
            raise ValueError(
                f"{source} has rank {len(index)} for `{name}`, this run asks for {rank}; type rank={len(index)} (or its"
                " entry in rank_pattern), or make a skeleton of that rank."
            )
