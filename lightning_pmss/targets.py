"""Which modules of a model are meant: canonical names, target patterns, and what must be refused before any work."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from lightning_pmss.config import PMSSConfig
from lightning_pmss.convertible import is_linear, is_supported, why_no_own_weight
from lightning_pmss.layers import can_output_edit, why_no_weight_edit
from lightning_pmss.messages import some
from lightning_pmss.quantised import why_unusable
from lightning_pmss.skeleton import Skeleton
from lightning_pmss.whole import clean_name, is_dtensor

# Names by which models that are no Hugging Face model usually call their output head.
HEAD_NAMES = ("lm_head", "head", "heads", "classifier", "score", "qa_outputs", "embed_out")


def hugging_face_root(model: nn.Module) -> tuple[nn.Module, str]:
    """The one outermost Hugging Face model inside ``model`` and its dotted prefix, else ``(model, "")``."""
    found: list[tuple[str, nn.Module]] = []
    for full, module in model.named_modules():
        name = clean_name(full)
        inside = any(name.startswith(f"{outer}.") or outer == "" for outer, _ in found)
        if not inside and is_hugging_face(module):
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
    # A wrapper and what it wraps have one clean name, and come in this order: the wrapped module stays.
    named = {clean_name(name): module for name, module in model.named_modules() if clean_name(name)}
    short = {name.removeprefix(prefix): module for name, module in named.items() if name + "." != prefix}
    return short if len(short) == len([n for n in named if n + "." != prefix]) else named


def find_targets(
    model: nn.Module, config: PMSSConfig, modules: Mapping[str, nn.Module], also_train: Sequence[str]
) -> tuple[list[str], dict[str, str]]:
    """Resolve ``target_modules`` and ``exclude_modules``: names to convert, and the linear layers left out with why."""
    excluded = match_modules(config.exclude_modules, modules, "exclude_modules")
    left_out: dict[str, str] = {}
    targets: list[str] = []
    everything = config.target_modules == "all-linear"
    if everything:
        candidates = [n for n, m in modules.items() if is_linear(m)]
        heads = _heads(model, modules, candidates)
    else:
        candidates = match_modules(config.target_modules, modules, "target_modules", linear=True)
        heads = {}
    by_name = not everything and not isinstance(config.target_modules, str)
    for name in candidates:
        if _below(name, excluded):
            left_out[name] = "excluded"
        elif everything and _below(name, also_train):
            left_out[name] = "trained in full"
        elif name in heads:
            left_out[name] = heads[name]
        elif not by_name and (reason := why_no_own_weight(modules[name])):
            left_out[name] = reason
        else:
            targets.append(name)
    if not targets:
        if candidates:
            reasons = "; ".join(f"{n}: {why}" for n, why in list(left_out.items())[:5])
            raise ValueError(f"every layer that target_modules matches is left out ({reasons}); loosen the patterns.")
        for name, module in modules.items():
            if reason := why_unusable(module):
                raise ValueError(f"`{name}` {reason}")
        raise ValueError(
            f"no linear layer was found in {type(model).__name__}. If its layers are made in `configure_model`, convert"
            " after that call (PMSSCallback does); layers made in `LightningModule.setup` come too late for a callback:"
            " make them in `__init__` or `configure_model`."
        )
    if clash := [n for n in targets if _below(n, also_train)]:
        raise ValueError(
            f"{some(clash)} match both target_modules and also_train; a module is either converted or trained."
        )
    return targets, left_out


def match_modules(
    patterns: str | Sequence[str], modules: Mapping[str, nn.Module], field: str, *, linear: bool = False
) -> list[str]:
    """Module names that match; each pattern must match at least one (with ``linear``: at least one linear layer)."""
    if isinstance(patterns, str):
        hits = [n for n in modules if _matches_regex(patterns, n, field)]
        # A regular expression may run over containers and norms on its way; a named module must itself be convertible.
        usable = [n for n in hits if is_supported(modules[n]) or why_no_own_weight(modules[n])] if linear else hits
        if not usable:
            _refuse_nomatch_modules(patterns, hits, modules, field, linear)
        return usable
    names: dict[str, None] = {}
    for pattern in patterns:
        hits = [n for n in modules if n == pattern or n.endswith(f".{pattern}")]
        if not hits:
            _refuse_nomatch_modules(pattern, hits, modules, field, linear)
        names.update(dict.fromkeys(hits))
    return [n for n in modules if n in names]


def _matches_regex(pattern: str, name: str, field: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise ValueError(
            f"{field}={pattern!r} is not a regular expression ({error}); for plain names type a list."
        ) from error


def _refuse_nomatch_modules(
    pattern: str, hits: list[str], modules: Mapping[str, nn.Module], field: str, linear: bool
) -> None:
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


def refuse_unconvertible(
    targets: list[str], modules: Mapping[str, nn.Module], config: PMSSConfig, skeleton: Skeleton | None
) -> None:
    owners: dict[int, list[str]] = {}
    for name, module in modules.items():
        for parameter in _parameters_used(module):
            owners.setdefault(id(parameter), []).append(name)
    for name in targets:
        layer = modules[name]
        if reason := why_unusable(layer):
            raise ValueError(f"`{name}` ({type(layer).__name__}) {reason}")
        if reason := why_no_own_weight(layer):
            raise ValueError(
                f"`{name}` ({type(layer).__name__}): {reason}. PMSS converts layers that own a plain weight. Take it"
                " out of target_modules or list it in exclude_modules; of torch's parametrisations, norms and pruning the"
                " result can be kept as a plain weight first (`remove_parametrizations`, `remove_weight_norm`,"
                " `prune.remove`)."
            )
        if not is_supported(layer):
            raise ValueError(
                f"`{name}` is a {type(layer).__name__} whose weight cannot be read as a floating-point matrix; PMSS converts"
                " nn.Linear and Conv1D layers. Take it out of target_modules or list it in exclude_modules."
            )
        weight: Tensor = layer.weight  # type: ignore[assignment]
        if len(shared := owners[id(weight)]) > 1:
            others = [n for n in shared if n != name]
            raise ValueError(
                f"`{name}` shares its weight with {some(others)}: a change to one would change both; exclude it."
            )
        if is_dtensor(weight):
            raise ValueError(
                f"`{name}` is already sharded; convert before `fully_shard`: call `model_built(self)` in `configure_model`"
                " (PMSSCallback converts there), or `convert(model, config)`."
            )
        if weight.is_meta and skeleton is None:
            raise ValueError(
                f"`{name}` is on the meta device: its rows and columns cannot be chosen; load the weights first or give"
                " skeleton_file=."
            )
        if skeleton is not None and name not in skeleton.layers:
            raise ValueError(
                f"{skeleton.source} has no rows and columns for `{name}`; it holds {some(sorted(skeleton.layers))}."
            )
        if weight.is_meta and config.coordinates != "raw" and skeleton.coordinates != config.coordinates:  # type: ignore[union-attr]
            stored = skeleton.coordinates or "no"  # type: ignore[union-attr]
            raise ValueError(
                f"`{name}` is on the meta device and coordinates={config.coordinates!r} need W, but {skeleton.source} holds"  # type: ignore[union-attr]
                f" {stored} coordinates. Make it with `python -m lightning_pmss select --coordinates {config.coordinates}`, or"
                " load the weights first."
            )
        if name.endswith("out_proj") and isinstance(modules.get(name.rpartition(".")[0]), nn.MultiheadAttention):
            raise ValueError(f"`{name}` belongs to nn.MultiheadAttention, which never calls its forward; exclude it.")
        if config.edit == "output" and not can_output_edit(layer):
            raise ValueError(
                f"`{name}`: edit='output' needs the product without its bias, which {type(layer).__name__} hides; use"
                " edit='auto'."
            )
        if config.edit == "weight" and (reason := why_no_weight_edit(layer, config.dropout)):
            raise ValueError(f"`{name}`: edit='weight' {reason}")


def _parameters_used(module: nn.Module) -> list[Tensor]:
    """A module's own parameters, and the weight of another one that it takes through an attribute or a property."""
    own: list[Tensor] = list(module.parameters(recurse=False))
    if is_linear(module) and "weight" not in module._parameters and "parametrizations" not in module._modules:
        own += [w for w in [getattr(module, "weight", None)] if isinstance(w, nn.Parameter)]
    return own


def ranks_of(config: PMSSConfig, targets: list[str], modules: Mapping[str, nn.Module]) -> dict[str, int]:
    def matches(pattern: str, name: str) -> bool:
        return name == pattern or name.endswith(f".{pattern}") or _matches_regex(pattern, name, "rank_pattern")

    for pattern in config.rank_pattern:
        if not any(matches(pattern, name) for name in targets):
            _refuse_nomatch_modules(pattern, [], {n: modules[n] for n in targets}, "rank_pattern", True)
    return {n: next((r for p, r in config.rank_pattern.items() if matches(p, n)), config.rank) for n in targets}


def _heads(model: nn.Module, modules: Mapping[str, nn.Module], candidates: list[str]) -> dict[str, str]:
    """The linear layers that ``"all-linear"`` leaves out, with the reason."""
    root, _ = hugging_face_root(model)
    heads: dict[str, str] = {}
    embedded = {id(m._parameters.get("weight")) for m in modules.values() if isinstance(m, nn.Embedding)} - {id(None)}
    body = getattr(root, getattr(root, "base_model_prefix", "") or "_", root)
    inside = {id(m) for m in body.modules()} if is_hugging_face(root) else None
    for name in candidates:
        parent = modules.get(name.rpartition(".")[0])
        if id(modules[name]._parameters.get("weight")) in embedded:
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


def _below(name: str, roots: Sequence[str]) -> bool:
    return any(name == root or name.startswith(f"{root}.") for root in roots)


def is_hugging_face(module: nn.Module) -> bool:
    return any(
        c.__name__ == "PreTrainedModel" and c.__module__.startswith("transformers.") for c in type(module).__mro__
    )
