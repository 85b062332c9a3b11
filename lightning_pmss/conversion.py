"""Find the target layers of a model, convert them in place, freeze the rest, and report what was done."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import safe_open
from torch import Tensor, nn
from tqdm.auto import tqdm

from lightning_pmss.config import PMSSConfig
from lightning_pmss.layers import (
    Frame,
    PMSSLinear,
    can_output_edit,
    canonical_shape,
    coordinate_frame,
    core_dtype,
    is_conv1d,
    is_supported,
    is_transposed,
)
from lightning_pmss.report import ConversionReport, LayerReport
from lightning_pmss.selection import projection_residual, select_skeleton

Skeleton = Mapping[str, tuple[Tensor, Tensor]]
"""Canonical module name -> (rows, cols)."""

# Names by which models that are no Hugging Face model usually call their output head.
HEAD_NAMES = ("lm_head", "head", "heads", "classifier", "score", "qa_outputs", "embed_out")


def convert(model: nn.Module, config: PMSSConfig, *, skeleton: Skeleton | None = None) -> ConversionReport:
    """Convert the targeted linear layers of a model in place and freeze everything but U and ``also_train``.

    Everything is checked and computed before the first layer is touched: after an error the model is as it was.

    Args:
        model: Any module. Names are taken relative to the Hugging Face model inside it, where there is exactly one.
        config: What to convert and how.
        skeleton: Rows and columns per module, used instead of selecting (as when an adapter is loaded).

    Returns:
        The report; converting again with an equal config changes nothing and returns the first one's report.

    Raises:
        ValueError: A pattern matches nothing, a matched layer cannot be converted (unsupported type, tied weight, meta
            tensor without a skeleton, already sharded, called past its ``forward``), or the model was converted with
            another config.
    """
    if (done := conversion_of(model)) is not None:
        if done.config == config and skeleton is None:
            return done
        changed = [k for k, v in config.to_dict().items() if done.config.to_dict()[k] != v]
        what = f"another config (differs in {', '.join(changed)})" if changed else "its own selection"
        raise ValueError(f"the model is already converted with {what}; build a fresh model and convert that one.")
    modules = canonical_modules(model)
    if config.skeleton_file is not None and skeleton is None:
        skeleton = read_skeleton(config.skeleton_file)
    also_train = _match(config.also_train, modules, "also_train")
    targets, left_out = find_targets(model, config, modules, also_train)
    _refuse_unconvertible(targets, modules, config, skeleton)
    ranks = _ranks(config, targets, modules)

    plans: dict[str, tuple[Tensor, Tensor, Frame]] = {}
    layers: list[LayerReport] = []
    for name in tqdm(targets, desc="selecting rows and columns", unit="layer", disable=None):
        layer = modules[name]
        weight = layer.weight.detach()  # type: ignore[union-attr, operator]
        weight = weight.T if is_transposed(layer) else weight
        shape = canonical_shape(layer)
        if skeleton is not None:
            rows, cols = _checked(skeleton[name], shape, name)
        else:
            rank = min(ranks[name], *shape)
            rows, cols = select_skeleton(
                weight,
                rank,
                selection=config.selection,
                row_mode=config.row_mode,
                oversample=config.oversample,
                seed=config.seed,
                name=name,
            )
        frame, residual = Frame(), None
        if not weight.is_meta:
            rows, cols = rows.to(weight.device), cols.to(weight.device)
            frame = coordinate_frame(weight[:, cols], weight[rows], config.coordinates, name)
            residual = projection_residual(weight, cols)
        plans[name] = rows, cols, frame
        layers.append(
            LayerReport(
                name=name,
                shape=shape,
                rank=len(cols),
                requested_rank=ranks[name] if skeleton is None else len(cols),
                edit="",
                trainable=len(cols) * len(rows),
                residual=residual,
                kept_bytes_per_token=len(rows) * weight.element_size(),
                file_bytes=len(cols) * len(rows) * core_dtype(weight.dtype).itemsize + 4 * (len(cols) + len(rows)),
            )
        )

    for report in layers:
        rows, cols, frame = plans[report.name]
        layer = PMSSLinear.adopt(
            modules[report.name],
            rows,
            cols,
            frame,
            scale=config.scale,
            coordinates=config.coordinates,
            dropout=config.dropout,
            edit=config.edit,
            memory=config.memory,
        )
        report.edit = layer.edit
    notes = _leave_fast_paths(model)
    model.requires_grad_(False)
    for name in targets:
        modules[name].core.weight.requires_grad_(True)  # type: ignore[union-attr, operator]
    for name in also_train:
        modules[name].requires_grad_(True)
    done = ConversionReport(
        config=config,
        layers=layers,
        left_out=left_out,
        also_train=sorted(also_train),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        total=sum(p.numel() for n, p in model.named_parameters() if not n.endswith((".core.left", ".core.right"))),
        also_train_bytes=sum(t.nbytes for name in also_train for t in modules[name].state_dict().values()),
        notes=notes,
    )
    hugging_face_root(model)[0].pmss_report = done  # type: ignore[assignment]
    return done


def conversion_of(model: nn.Module) -> ConversionReport | None:
    """The report of the conversion that this model went through, or None."""
    for module in model.modules():
        if isinstance(report := module.__dict__.get("pmss_report"), ConversionReport):
            return report
    return None


def pmss_layers(model: nn.Module) -> dict[str, PMSSLinear]:
    """The converted layers under their canonical names."""
    return {name: m for name, m in canonical_modules(model).items() if isinstance(m, PMSSLinear)}


def hugging_face_root(model: nn.Module) -> tuple[nn.Module, str]:
    """The one outermost Hugging Face model inside ``model`` and its dotted prefix, else ``(model, "")``."""
    found: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") or outer == "" for outer, _ in found)
        if not inside and _is_hugging_face(module):
            found.append((name, module))
    if len(found) != 1:
        return model, ""
    return found[0][1], f"{found[0][0]}." if found[0][0] else ""


def canonical_modules(model: nn.Module) -> dict[str, nn.Module]:
    """All modules by canonical name: relative to the Hugging Face model inside, full names outside of it.

    So an adapter trained inside a LightningModule loads into the plain model. Where the two would collide, all names
    stay full.
    """
    _, prefix = hugging_face_root(model)
    named = {name: module for name, module in model.named_modules() if name}
    short = {name.removeprefix(prefix): module for name, module in named.items() if name + "." != prefix}
    return short if len(short) == len([n for n in named if n + "." != prefix]) else named


def find_targets(
    model: nn.Module, config: PMSSConfig, modules: Mapping[str, nn.Module], also_train: Sequence[str]
) -> tuple[list[str], dict[str, str]]:
    """Resolve ``target_modules`` and ``exclude_modules``: names to convert, and the linear layers left out with why."""
    excluded = _match(config.exclude_modules, modules, "exclude_modules")
    left_out: dict[str, str] = {}
    targets: list[str] = []
    everything = config.target_modules == "all-linear"
    if everything:
        candidates = [n for n, m in modules.items() if isinstance(m, nn.Linear) or is_conv1d(m)]
        heads = _heads(model, modules, candidates)
    else:
        candidates = _match(config.target_modules, modules, "target_modules", linear=True)
        heads = {}
    for name in candidates:
        if _below(name, excluded):
            left_out[name] = "excluded"
        elif everything and _below(name, also_train):
            left_out[name] = "trained in full"
        elif name in heads:
            left_out[name] = heads[name]
        else:
            targets.append(name)
    if not targets:
        if candidates:
            reasons = "; ".join(f"{n}: {why}" for n, why in list(left_out.items())[:5])
            raise ValueError(f"every layer that target_modules matches is left out ({reasons}); loosen the patterns.")
        raise ValueError(
            f"no linear layer was found in {type(model).__name__}. If its layers are made in `configure_model`, convert"
            " after that call (PMSSCallback does); layers made in `LightningModule.setup` come too late for a callback:"
            " make them in `__init__` or `configure_model`."
        )
    if clash := [n for n in targets if _below(n, also_train)]:
        raise ValueError(
            f"{_some(clash)} match both target_modules and also_train; a module is either converted or trained."
        )
    return targets, left_out


def read_skeleton(path: str | Path) -> Skeleton:
    """Read ``<module>.rows`` and ``<module>.cols`` from a safetensors file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"skeleton_file={str(path)!r} does not exist.")
    with safe_open(str(path), framework="pt") as file:
        keys = set(file.keys())
        names = sorted(key.removesuffix(".rows") for key in keys if key.endswith(".rows"))
        if not names or any(f"{n}.cols" not in keys for n in names):
            raise ValueError(f"skeleton_file={str(path)!r} does not hold `<module>.rows` and `<module>.cols` in pairs.")
        return {n: (file.get_tensor(f"{n}.rows").long(), file.get_tensor(f"{n}.cols").long()) for n in names}


def _match(
    patterns: str | Sequence[str], modules: Mapping[str, nn.Module], field: str, *, linear: bool = False
) -> list[str]:
    """Module names that match; each pattern must match at least one (with ``linear``: at least one linear layer)."""
    if isinstance(patterns, str):
        hits = [n for n in modules if _matches_regex(patterns, n, field)]
        # A regular expression may run over containers and norms on its way; a named module must itself be convertible.
        usable = [n for n in hits if is_supported(modules[n])] if linear else hits
        if not usable:
            _refuse_no_match(patterns, hits, modules, field, linear)
        return usable
    names: dict[str, None] = {}
    for pattern in patterns:
        hits = [n for n in modules if n == pattern or n.endswith(f".{pattern}")]
        if not hits:
            _refuse_no_match(pattern, hits, modules, field, linear)
        names.update(dict.fromkeys(hits))
    return [n for n in modules if n in names]


def _matches_regex(pattern: str, name: str, field: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise ValueError(
            f"{field}={pattern!r} is not a regular expression ({error}); for plain names type a list."
        ) from error


def _refuse_no_match(pattern: str, hits: list[str], modules: Mapping[str, nn.Module], field: str, linear: bool) -> None:
    if hits:
        kinds = sorted({type(modules[n]).__name__ for n in hits})
        raise ValueError(
            f"{field}: {pattern!r} matches only {', '.join(kinds)}; PMSS converts nn.Linear and Conv1D layers."
        )
    known = [n for n in modules if not linear or is_supported(modules[n])]
    endings = {n.rsplit(".", 1)[-1] for n in known}
    close = difflib.get_close_matches(pattern, sorted(endings | set(known)), n=4, cutoff=0.4) or sorted(endings)[:8]
    hint = f"closest names: {', '.join(close)}" if close else "the model has no such layers"
    raise ValueError(f"{field}: {pattern!r} matches no module; {hint}.")


def _refuse_unconvertible(
    targets: list[str], modules: Mapping[str, nn.Module], config: PMSSConfig, skeleton: Skeleton | None
) -> None:
    owners: dict[int, list[str]] = {}
    for name, module in modules.items():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    for name in targets:
        layer = modules[name]
        if not is_supported(layer):
            raise ValueError(
                f"`{name}` is a {type(layer).__name__} whose weight cannot be read as a floating-point matrix; PMSS converts"
                " nn.Linear and Conv1D layers. Take it out of target_modules or list it in exclude_modules."
            )
        weight: Tensor = layer.weight  # type: ignore[assignment]
        if len(shared := owners[id(weight)]) > 1:
            others = [n for n in shared if n != name]
            raise ValueError(
                f"`{name}` shares its weight with {_some(others)}: a change to one would change both; exclude it."
            )
        if any("DTensor" in c.__name__ for c in type(weight).__mro__):
            raise ValueError(f"`{name}` is already sharded; call `convert(model, config)` before `fully_shard`.")
        if weight.is_meta and skeleton is None:
            raise ValueError(
                f"`{name}` is on the meta device: its rows and columns cannot be chosen; load the weights first or give skeleton_file=."
            )
        if weight.is_meta and config.coordinates != "raw":
            raise ValueError(
                f"`{name}` is on the meta device: coordinates={config.coordinates!r} need W; load the weights first."
            )
        if skeleton is not None and name not in skeleton:
            raise ValueError(f"the skeleton has no rows and columns for `{name}`; it holds {_some(sorted(skeleton))}.")
        if name.endswith("out_proj") and isinstance(modules.get(name.rpartition(".")[0]), nn.MultiheadAttention):
            raise ValueError(f"`{name}` belongs to nn.MultiheadAttention, which never calls its forward; exclude it.")
        if config.edit == "output" and not can_output_edit(layer):
            raise ValueError(
                f"`{name}`: edit='output' needs the product without its bias, which {type(layer).__name__} hides; use edit='auto'."
            )


def _ranks(config: PMSSConfig, targets: list[str], modules: Mapping[str, nn.Module]) -> dict[str, int]:
    def matches(pattern: str, name: str) -> bool:
        return name == pattern or name.endswith(f".{pattern}") or _matches_regex(pattern, name, "rank_pattern")

    for pattern in config.rank_pattern:
        if not any(matches(pattern, name) for name in targets):
            _refuse_no_match(pattern, [], {n: modules[n] for n in targets}, "rank_pattern", True)
    return {n: next((r for p, r in config.rank_pattern.items() if matches(p, n)), config.rank) for n in targets}


def _heads(model: nn.Module, modules: Mapping[str, nn.Module], candidates: list[str]) -> dict[str, str]:
    """The linear layers that ``"all-linear"`` leaves out, with the reason."""
    root, _ = hugging_face_root(model)
    heads: dict[str, str] = {}
    embedded = {id(m.weight) for m in modules.values() if isinstance(m, nn.Embedding)}
    body = getattr(root, getattr(root, "base_model_prefix", "") or "_", root)
    inside = {id(m) for m in body.modules()} if _is_hugging_face(root) else None
    for name in candidates:
        parent = modules.get(name.rpartition(".")[0])
        if id(modules[name].weight) in embedded:
            heads[name] = "shares the embedding's weight"
        elif (
            inside is not None
            and id(modules[name]) not in inside
            or inside is None
            and any(part in HEAD_NAMES for part in name.split("."))
        ):
            heads[name] = "output head"
        elif isinstance(parent, nn.MultiheadAttention):
            heads[name] = "nn.MultiheadAttention never calls its forward"
    return heads


def _leave_fast_paths(model: nn.Module) -> list[str]:
    """Keep torch's fused encoder kernel from running on the bare weights of converted layers in evaluation."""
    notes = []
    for name, module in model.named_modules():
        if not any(isinstance(m, PMSSLinear) for m in module.modules()):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # torch's own switch: without a known activation the plain path runs
            notes.append(
                f"`{name}`: the fused inference path of nn.TransformerEncoderLayer reads weights directly; off"
            )
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
    return notes


def _checked(indices: tuple[Tensor, Tensor], shape: tuple[int, int], name: str) -> tuple[Tensor, Tensor]:
    for what, index, size in (("rows", indices[0], shape[0]), ("cols", indices[1], shape[1])):
        if (
            index.dim() != 1
            or len(index) == 0
            or len(index.unique()) != len(index)
            or not 0 <= int(index.min()) <= int(index.max()) < size
        ):
            raise ValueError(
                f"`{name}`: the stored {what} are not distinct indices below {size}; the file is for another model."
            )
    return indices[0].long(), indices[1].long()


def _below(name: str, roots: Sequence[str]) -> bool:
    return any(name == root or name.startswith(f"{root}.") for root in roots)


def _is_hugging_face(module: nn.Module) -> bool:
    return any(
        c.__name__ == "PreTrainedModel" and c.__module__.startswith("transformers.") for c in type(module).__mro__
    )


def _some(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f"`{n}`" for n in names[:most]) + more
