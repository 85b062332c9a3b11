"""Find the target layers of a model, convert them in place, freeze the rest, and report what was done."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lightning_pmss.conversion.converted import changed_fields, is_complete, layers_to_keep, record
from lightning_pmss.conversion.converted import conversion_of as conversion_of
from lightning_pmss.conversion.converted import pmss_layers as pmss_layers
from lightning_pmss.conversion.left_out import LeftOut
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
    refuse_unconvertible,
)
from lightning_pmss.layers.fingerprint import same_base
from lightning_pmss.layers.parts import clean_name, outside_zero_init, whole_size
from lightning_pmss.layers.quantised import hidden_values, prepare, quantisation_of, value_dtype, whole_weight
from lightning_pmss.messages import some
from lightning_pmss.methods.pmss.config import PMSSConfig
from lightning_pmss.methods.pmss.coordinates import PMSSCore, core_dtype
from lightning_pmss.methods.pmss.layer import Frame, PMSSLinear, canonical_shape, coordinate_frame, is_transposed
from lightning_pmss.methods.pmss.number_range import why_out_of_range
from lightning_pmss.methods.pmss.rounding import LIMIT, LOW_PRECISION, fitting_rank, rounding_error
from lightning_pmss.methods.pmss.selection import projection_residual, select_skeleton
from lightning_pmss.methods.pmss.skeleton import Skeleton, SkeletonLayer, read_skeleton


def convert(
    model: nn.Module,
    config: PMSSConfig,
    *,
    skeleton: Skeleton | None = None,
    updates: Mapping[str, Tensor] | None = None,
    compute_dtype: torch.dtype | None = None,
    names: Names | None = None,
) -> ConversionReport:
    """Convert the targeted linear layers of a model in place and freeze everything but U and ``also_train``.

    Everything is checked and computed before the first layer is touched: after an error the model is as it was. What was
    converted before as a model of its own is kept, with what it has learned, where the config is the same.

    Args:
        model: Any module. Names are taken relative to ``config.root``, else to the Hugging Face model inside it, where there
            is exactly one that is not frozen and in eval mode as a whole.
        config: What to convert and how.
        skeleton: Rows and columns per module, used instead of selecting (as when an adapter is loaded).
        updates: ``s U [c, r]`` per module to start from, in place of zero.
        compute_dtype: In which the layers will compute under autocast; default: the dtype of their weights.
        names: What to convert, in place of the config's patterns; the ranks are then the skeleton's.

    Returns:
        The report; converting again with an equal config changes nothing and returns the first one's report.

    Raises:
        ValueError: A pattern matches nothing, a matched layer cannot be converted (unsupported type, tied weight, meta
            tensor without a skeleton, already sharded, called past its ``forward``, weights so small or large that an
            update leaves the range of the dtype), the model was converted with another config, or an update that its
            coordinates cannot hold.
    """
    root = None if config.root is None or names is not None else choose_root(model, config.root)
    if (done := conversion_of(model, root)) is not None:
        changed = changed_fields(done.config, config, inside=adapted_root(model, root)[0] is model)
        if changed or skeleton is not None:
            what = f"another config (differs in {', '.join(changed)})" if changed else "its own selection"
            raise ValueError(f"the model is already converted with {what}; build a fresh model and convert that one.")
        if is_complete(model, done, root):
            settle_root(model, adapted_root(model, root)[1].removesuffix("."))
            return done
    root = choose_root(model, config.root) if names is None else names.root
    modules = canonical_modules(model, root)
    if config.skeleton_file is not None and skeleton is None:
        skeleton = read_skeleton(config.skeleton_file)
    if names is None:
        also_train = match_modules(config.also_train, modules, "also_train", owners=canonical_owners(model, root))
        targets, left_out = find_targets(model, config, modules, also_train, root)
        ranks = ranks_of(config, targets, modules)
    else:
        assert skeleton is not None
        also_train = list(names.also_train)
        targets, left_out = named_targets(model, names, modules)
        ranks = {name: len(skeleton.layers[name].cols) for name in targets}
    kept = layers_to_keep(model, config, modules, ranks, left_out)
    fresh = [name for name in targets if name not in kept]
    if done is not None and not fresh:
        settle_root(model, root)
        return done
    refuse_unconvertible(fresh, modules, config, skeleton)

    prepare(model)
    with outside_zero_init():
        plans = _plan(fresh, modules, config, skeleton, ranks, compute_dtype)
        starts = {
            name: _numbers(plans[name], modules[name], update, config, name) for name, update in (updates or {}).items()
        }
        from_file = skeleton is not None and skeleton.coordinates == config.coordinates
        for name, plan in plans.items():
            layer = PMSSLinear.adopt(
                modules[name],
                plan.rows,
                plan.cols,
                plan.frame or Frame(),
                scale=config.scale_of(len(plan.cols)),
                coordinates=config.coordinates,
                dropout=config.dropout,
                edit=config.edit,
                memory=config.memory,
            )
            layer.fingerprint = plan.fingerprint
            layer.frame_dtype = None if from_file else value_dtype(layer)
            if name in starts:
                layer.core.weight.data.copy_(starts[name])
        layers = kept | {name: _report(name, modules[name], ranks[name], plan) for name, plan in plans.items()}
    notes = [*_leave_fast_paths(model), *_several(model, root, left_out, modules)]
    model.requires_grad_(False)
    for name in targets:
        modules[name].core.weight.requires_grad_(True)  # type: ignore[union-attr, operator]
    for name in also_train:
        modules[name].requires_grad_(True)
    done = ConversionReport(
        config=config,
        layers=[layers[name] for name in targets],
        left_out=left_out.reasons,
        also_train=sorted(also_train),
        trainable=sum(whole_size(p) for p in model.parameters() if p.requires_grad),
        total=sum(whole_size(p) for n, p in model.named_parameters() if ".core.frame." not in n) + hidden_values(model),
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


def _plan(
    targets: list[str],
    modules: Mapping[str, nn.Module],
    config: PMSSConfig,
    skeleton: Skeleton | None,
    ranks: Mapping[str, int],
    compute_dtype: torch.dtype | None,
) -> dict[str, SkeletonLayer]:
    """Rows, columns and frame of every target; nothing is touched. A collective where weights are kept in parts."""
    plans: dict[str, SkeletonLayer] = {}
    strangers = []
    others = (
        torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank() > 0
    )
    # None: no bar where the output is no terminal.
    for name in tqdm(targets, desc="selecting rows and columns", unit="layer", disable=True if others else None):
        layer, shape = modules[name], canonical_shape(modules[name])
        if skeleton is not None:
            stored = skeleton.layers[name]
            _check_stored(stored, shape, min(ranks[name], *shape), name, skeleton.source)
        with whole_weight(layer) if not layer.weight.is_meta else nullcontext() as weight:  # type: ignore[union-attr]
            weight = weight.T if weight is not None and is_transposed(layer) else weight
            if skeleton is None:
                assert weight is not None  # meta weights without a skeleton were refused
                rows, cols = select_skeleton(
                    weight,
                    min(ranks[name], *shape),
                    selection=config.selection,
                    row_mode=config.row_mode,
                    oversample=config.oversample,
                    seed=config.seed,
                    name=name,
                )
                # Ascending: gathers of every pass read memory in order, two to five times faster.
                stored = SkeletonLayer(rows.sort().values, cols.sort().values)
            frame = stored.frame if skeleton is not None and skeleton.coordinates == config.coordinates else None
            residual = stored.residual
            if weight is not None:
                rows, cols = stored.rows.to(weight.device), stored.cols.to(weight.device)
                if stored.fingerprint is not None and not same_base(stored.fingerprint, weight[rows], weight[:, cols]):
                    strangers.append(name)
                    continue
                slices = weight[:, cols], weight[rows]
                frame = frame or coordinate_frame(*slices, config.coordinates, name, weight=weight)
                if skeleton is None or config.skeleton_file is not None:  # not where an adapter brings its own U
                    dtype, scale = compute_dtype or value_dtype(layer), config.scale_of(len(cols))
                    if reason := why_out_of_range(weight, slices, frame, config.coordinates, scale, dtype):
                        raise ValueError(f"`{name}` {reason}")
                residual = projection_residual(weight, cols) if residual is None else residual
        plans[name] = SkeletonLayer(stored.rows, stored.cols, frame, stored.fingerprint, shape, residual)
    if strangers and skeleton is not None:
        remedy = "Make it anew with `python -m lightning_pmss select --model <this base>`."
        if kind := quantisation_of(modules[strangers[0]]):
            remedy = f"These are quantised ({kind}), and files are read as stored: leave skeleton_file out."
        raise ValueError(
            f"{skeleton.source} belongs to another base model: the rows and columns of {some(strangers)} are not those it"
            f" was made from. {remedy}"
        )
    return plans


def _numbers(plan: SkeletonLayer, layer: nn.Module, update: Tensor, config: PMSSConfig, name: str) -> Tensor:
    """What the layer's trained tensor starts from."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    columns, rows = len(plan.cols), len(plan.rows)
    core = PMSSCore(columns, rows, plan.frame or Frame(), core_dtype(weight.dtype), weight.device)
    return core.numbers_of(update, config.scale_of(columns), name)


def _report(name: str, layer: nn.Module, requested: int, plan: SkeletonLayer) -> LayerReport:
    assert isinstance(layer, PMSSLinear)
    dtype = value_dtype(layer)
    low = dtype if dtype in LOW_PRECISION else torch.bfloat16  # in which autocast may compute
    frame = plan.frame or Frame()
    error = rounding_error(frame, low)
    return LayerReport(
        name=name,
        shape=canonical_shape(layer),
        rank=len(layer.cols),
        requested_rank=requested,
        edit=layer.edit,
        trainable=whole_size(layer.core.weight),
        residual=plan.residual,
        kept_bytes_per_token=len(layer.rows) * dtype.itemsize,
        file_bytes=layer.file_bytes,
        rounding_error=error,
        fitting_rank=fitting_rank(frame, low) if error > LIMIT else None,
    )


def _children(model: nn.Module, targets: Sequence[str], modules: Mapping[str, nn.Module]) -> dict[str, int]:
    """How many of the targets lie in which top-level child of the model."""
    ours = {id(modules[name]) for name in targets}
    full = [clean_name(name) for name, module in model.named_modules() if id(module) in ours]
    return dict(Counter(name.split(".")[0] for name in full))


def _shares(model: nn.Module, names: Sequence[str], root: str, total: int) -> dict[str, float]:
    """The share of the model's parameters in each of these modules and parameters."""
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
    """A hint where several Hugging Face models were converted together, so that the names are of none of them alone."""
    asleep = {id(m) for name in left_out.asleep for m in modules[name].modules()}
    awake = [m for m in hugging_face_models(model) if id(m) not in asleep]
    if root or len(awake) < 2:
        return []
    names = {id(m): clean_name(name) for name, m in model.named_modules()}
    return [
        f"{some([names[id(m)] for m in awake])} are models of their own: root={names[id(awake[0])]!r} makes names, adapter and"
        " merged model of one alone"
    ]


def _leave_fast_paths(model: nn.Module) -> list[str]:
    """Keep torch's fused encoder kernel from running on the bare weights of converted layers in evaluation."""
    notes = []
    for name, module in model.named_modules():
        if not any(isinstance(m, PMSSLinear) for m in module.modules()):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # torch's own switch: without a known activation the plain path runs
            notes.append(
                f"`{clean_name(name)}`: the fused inference path of nn.TransformerEncoderLayer reads weights directly; off"
            )
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
    return notes


def _check_stored(stored: SkeletonLayer, shape: tuple[int, int], rank: int, name: str, source: str) -> None:
    if stored.shape is not None and stored.shape != shape:
        raise ValueError(
            f"{source}: `{name}` was {stored.shape} there and is {shape} in this model; it is another base."
        )
    for what, index, size in (("rows", stored.rows, shape[0]), ("cols", stored.cols, shape[1])):
        if (
            index.dim() != 1
            or len(index) == 0
            or len(index.unique()) != len(index)
            or not 0 <= int(index.min()) <= int(index.max()) < size
        ):
            raise ValueError(
                f"{source}: the {what} of `{name}` are not distinct indices below {size}; the file is for another model."
            )
        if len(index) != rank:
            raise ValueError(
                f"{source} holds rank {len(index)} for `{name}`, this run asks for {rank}; type rank={len(index)} (or its"
                " entry in rank_pattern), or make a skeleton of that rank."
            )
