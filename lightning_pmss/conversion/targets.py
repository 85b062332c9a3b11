"""Resolve the patterns of a config to modules, and refuse modules that cannot be converted."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn

from lightning_pmss.conversion.experts import (
    ends_in,
    experts_by_parameter,
    match_parameters,
    matrices_in,
    parameter_names,
    refuse_mixed_ranks,
    without_experts,
)
from lightning_pmss.conversion.expression import Expression
from lightning_pmss.conversion.heads import heads_of
from lightning_pmss.conversion.left_out import (
    ASLEEP,
    EXCLUDED,
    IN_FULL,
    UNTARGETED,
    LeftOut,
    frozen_weights,
    resting,
)
from lightning_pmss.conversion.roots import adapted_root, below, canonical_owners, why_no_matrix_layer
from lightning_pmss.layers.convertible import is_known, is_linear, is_supported, why_no_own_weight
from lightning_pmss.layers.expert_layer import ExpertLinear, holder, is_fused_experts, parameter_name
from lightning_pmss.layers.matrix_layer import MatrixLinear
from lightning_pmss.layers.operators import CONVERTED, why_not_applied
from lightning_pmss.layers.parts import clean_name, whole_shape
from lightning_pmss.layers.quantised import why_unusable
from lightning_pmss.messages import some
from lightning_pmss.methods.config import AdapterConfig


@dataclass(frozen=True)
class Names:
    """Converted layers as a file lists them. The names are literal: nothing in a file is run as a pattern.

    Attributes:
        root: Full name of the module that the other names are relative to; see `adapted_root`.
        targets: Canonical names of the layers.
        also_train: Canonical names of the modules trained in full.
        ranks: Rank by name of layer.
    """

    root: str
    targets: Sequence[str]
    also_train: Sequence[str]
    ranks: Mapping[str, int]


def find_targets(
    model: nn.Module,
    config: AdapterConfig,
    modules: Mapping[str, nn.Module],
    also_train: Sequence[str],
    root: str | None = None,
) -> tuple[list[str], LeftOut]:
    """Resolve ``target_modules`` and ``exclude_modules``.

    Args:
        model: A model before its conversion.
        config: The patterns.
        modules: Result of `canonical_modules` with the same ``root``.
        also_train: Canonical names of the modules trained in full.
        root: See `adapted_root`.

    Returns:
        Names of the layers to convert, and the parts left out with their reasons.

    Raises:
        ValueError: A pattern matches nothing, or nothing is left to convert.
    """
    owners = canonical_owners(model, root)
    real, fused = without_experts(modules), experts_by_parameter(modules, modules)
    of_parameters = {name: holder(modules[group[0]]) for name, group in fused.items()}
    of_parameters |= {name: layer.owner for name, layer in matrices_in(modules, modules).items()}
    excluded = match_modules(config.exclude_modules, real | of_parameters, "exclude_modules", owners=owners)
    away = _away(model, config.root)
    within = {name: m for name, m in modules.items() if away.get(id(holder(m))) != outside_of(config.root)}
    reasons: dict[str, str] = {}
    targets: list[str] = []
    everything = config.target_modules == "all-linear"
    inside = without_experts(within)
    wanted = _names(config.target_modules, inside)
    named = () if isinstance(wanted, str) else wanted
    if everything:
        candidates = [n for n, m in within.items() if is_linear(m) and not isinstance(m, MatrixLinear)]
        heads = heads_of(adapted_root(model, root)[0], modules, [n for n in candidates if n in real])
    else:
        candidates = match_modules(wanted, inside, "target_modules", linear=True, owners=owners)
        heads = {}
    if config.target_parameters:
        more = set(match_parameters(config.target_parameters, within, owners))
        candidates = [n for n in within if n in more or n in set(candidates)]
    for name in candidates:
        label = parameter_name(name) if isinstance(modules[name], ExpertLinear) else name
        if below(name, excluded):
            reasons[label] = EXCLUDED
        elif everything and below(name, also_train):
            reasons[label] = IN_FULL
        elif id(holder(modules[name])) in away and name not in named:  # a listed full name overrides the reason
            reasons[label] = away[id(holder(modules[name]))]
        elif name in heads:
            reasons[name] = heads[name]
        elif (
            not named
            and name in real
            and (reason := why_no_own_weight(modules[name]) or why_not_applied(modules[name]))
        ):
            reasons[name] = reason
        else:
            targets.append(name)
    if not targets:
        _refuse_nothing(model, modules, candidates, reasons)
    if clash := [n for n in targets if below(n, also_train)]:
        raise ValueError(
            f"{some(clash)} match both target_modules and also_train; a module is either converted or trained."
        )
    branches = {id(m): EXCLUDED for n in excluded if n in real for m in real[n].modules()} | away
    return targets, _left_out(owners, modules, targets, also_train, reasons, branches)


def named_targets(model: nn.Module, names: Names, modules: Mapping[str, nn.Module]) -> tuple[list[str], LeftOut]:
    """Layers to convert and parts left out, for the names in a file."""
    targets = [name for name in modules if name in set(names.targets)]
    owners = canonical_owners(model, names.root)
    return targets, _left_out(owners, modules, targets, names.also_train, {}, _away(model, None))


def _left_out(
    owners: Sequence[tuple[str, nn.Module]],
    modules: Mapping[str, nn.Module],
    targets: Sequence[str],
    also_train: Sequence[str],
    reasons: dict[str, str],
    branches: Mapping[int, str],
) -> LeftOut:
    """Collect the parts of a model that are not converted.

    Args:
        owners: Result of `canonical_owners`.
        modules: Result of `canonical_modules`.
        targets: Names of the layers to convert.
        also_train: Names of the modules trained in full.
        reasons: Reasons known so far, by name of layer; the others are added.
        branches: Reason by id of module, for branches left out as a whole.
    """
    fused = experts_by_parameter(modules, modules)
    one_of = {name: modules[group[0]] for name, group in fused.items()}  # whose parameter is that of all
    accounted = {id(p) for n in (*targets, *also_train, *reasons) for p in (one_of.get(n) or modules[n]).parameters()}
    unowned = []
    for owner, module in sorted(owners, key=lambda item: not is_linear(item[1])):  # tied: listed under the linear layer
        for name, reason, nobodys in frozen_weights(owner, module, accounted, branches):
            reasons[name] = reason
            if nobodys:
                unowned.append(name)
    for name, module in without_experts(modules).items():  # linear layers whose parameters are all shared
        if is_linear(module) and name not in targets and not below(name, also_train):
            reasons.setdefault(name, branches.get(id(module), UNTARGETED))
    asleep: list[str] = []
    for name, module in modules.items():
        if branches.get(id(module)) == ASLEEP and not below(name, asleep):
            asleep.append(name)
    return LeftOut(reasons, unowned, asleep)


def _refuse_nothing(
    model: nn.Module, modules: Mapping[str, nn.Module], candidates: Sequence[str], reasons: Mapping[str, str]
) -> None:
    if candidates:
        why = "; ".join(f"{n}: {reason}" for n, reason in list(reasons.items())[:5])
        remedy = "loosen the patterns"
        if ASLEEP in reasons.values():
            remedy += ", or call `train()` on what is to be adapted before it is converted, or name it as root="
        raise ValueError(f"every layer that target_modules matches is left out ({why}); {remedy}.")
    for name, module in modules.items():
        if reason := why_unusable(module):
            raise ValueError(f"`{name}` {reason}")
    raise ValueError(
        f"no linear layer was found in {type(model).__name__}. If its layers are made in `configure_model`, convert"
        " after that call (PMSSCallback does); layers made in `LightningModule.setup` come too late for a callback:"
        " make them in `__init__` or `configure_model`."
    )


def outside_of(root: str | None) -> str:
    """Reason given for modules outside the chosen root."""
    return f"outside of root={root!r}"


def _away(model: nn.Module, root: str | None) -> dict[int, str]:
    """Reason by id of the modules left out as a whole: those outside the chosen root, and resting ones."""
    if root is None:
        return resting(model).modules
    named = {clean_name(name): module for name, module in model.named_modules()}
    inside = {id(module) for module in named[root].modules()}
    outside = {id(module): outside_of(root) for module in named.values() if id(module) not in inside}
    return resting(named[root]).modules | outside


def match_modules(
    patterns: str | Sequence[str],
    modules: Mapping[str, nn.Module],
    field: str,
    *,
    linear: bool = False,
    owners: Sequence[tuple[str, nn.Module]] = (),
) -> list[str]:
    """Names of the modules that match a regular expression, or a list of names and name endings.

    Args:
        patterns: The expression or the list.
        modules: Result of `canonical_modules`.
        field: Name of the option, for messages.
        linear: Whether each pattern must match a linear layer.
        owners: Result of `canonical_owners`, to recognise parameters of the model itself.

    Raises:
        ValueError: A pattern matches nothing.
    """
    patterns = _names(patterns, modules)
    if isinstance(patterns, str):
        expression = Expression(patterns, field)
        hits = [n for n in modules if expression.matches(n)]
        # A regular expression may also match containers and norms; a listed module must itself be convertible.
        usable = (
            [
                n
                for n in hits
                if is_supported(modules[n]) or why_no_own_weight(modules[n]) or why_not_applied(modules[n])
            ]
            if linear
            else hits
        )
        if not usable:
            if not hits:
                for matches in (partial(ends_in, patterns), expression.matches):
                    _refuse_parameter(patterns, matches, owners or modules.items(), field)
            _refuse_no_match(patterns, hits, modules, field, linear)
        return usable
    names: dict[str, None] = {}
    for pattern in patterns:
        hits = [n for n in modules if ends_in(pattern, n)]
        if not hits:
            _refuse_parameter(pattern, partial(ends_in, pattern), owners or modules.items(), field)
            _refuse_no_match(pattern, hits, modules, field, linear)
        names.update(dict.fromkeys(hits))
    return [n for n in modules if n in names]


def _names(patterns: str | Sequence[str], modules: Iterable[str]) -> str | Sequence[str]:
    """Put a lone string into a list if it is the name of a module or the end of one."""
    lone = isinstance(patterns, str) and any(ends_in(patterns, name) for name in modules)
    return [patterns] if lone else patterns  # type: ignore[list-item]


def _refuse_parameter(
    pattern: str, matches: Callable[[str], bool], owners: Iterable[tuple[str, nn.Module]], field: str
) -> None:
    """Raise ValueError if a pattern that matches no module names a parameter."""
    for name, module in owners:
        for key, parameter in module._parameters.items():
            if parameter is None or not matches(f"{name}.{key}".lstrip(".")):
                continue
            kind, shape = type(module).__name__, list(whole_shape(parameter))
            of = f"a parameter {shape} of the {kind} " + (f"`{name}`" if name else "itself")
            text = f"{field}: {pattern!r} is no module but {of}."
            if field != "target_modules" or is_known(module):
                raise ValueError(f"{text} Patterns name modules" + (f": type {name!r}." if name else "."))
            if is_fused_experts(module) and len(whole_shape(parameter)) == 3:
                raise ValueError(f"{text} Experts are converted by target_parameters=[{key!r}].")
            if why_no_matrix_layer(name, module, key) is None:
                raise ValueError(f"{text} Matrices of such modules are converted by target_parameters=[{pattern!r}].")
            raise ValueError(
                f"{text} lightning-pmss converts {CONVERTED}: take it out of target_modules; it stays frozen"
                + (f", or is trained in full with also_train=[{name!r}]." if name else ".")
            )


def _refuse_no_match(pattern: str, hits: list[str], modules: Mapping[str, nn.Module], field: str, linear: bool) -> None:
    if hits:
        kinds = sorted({type(modules[n]).__name__ for n in hits})
        raise ValueError(f"{field}: {pattern!r} matches only {', '.join(kinds)}; lightning-pmss converts {CONVERTED}.")
    raise ValueError(f"{field}: {pattern!r} matches no module; {_remedy(pattern, modules, linear)}.")


def _remedy(pattern: str, modules: Mapping[str, nn.Module], linear: bool) -> str:
    """Advice on a pattern that matches nothing."""
    several = [part for part in re.split(r"[\s,;\[\]'\"]+", pattern) if part]
    if len(several) > 1 and all(any(ends_in(part, name) for name in modules) for part in several):
        return f"for several names type [{', '.join(several)}]"
    if pattern == "all-linear":
        return "type all-linear alone, not in a list"
    try:
        expression = Expression(pattern, "")
        if any(map(expression.matches, modules)):
            return "a list contains names; type a regular expression alone, not in a list"
    except ValueError:  # a name, not a regular expression
        pass
    known = [n for n in modules if not linear or is_supported(modules[n])]
    endings = {n.rsplit(".", 1)[-1] for n in known}
    close = difflib.get_close_matches(pattern, sorted(endings | set(known)), n=4, cutoff=0.4) or sorted(endings)[:8]
    return f"closest names: {', '.join(close)}" if close else "the model has no such layers"


def ranks_of(config: AdapterConfig, targets: list[str], modules: Mapping[str, nn.Module]) -> dict[str, int]:
    ranks: dict[str, int] = {}
    for pattern, rank in config.rank_pattern.items():
        expression = Expression(pattern, "rank_pattern")
        names = {
            name: [name, *parameter_names(name, modules)] for name in targets
        }  # experts are named by their parameter
        hits = [name for name in targets if any(ends_in(pattern, n) or expression.matches(n) for n in names[name])]
        if not hits:
            _refuse_no_match(pattern, [], {n: modules[n] for n in targets}, "rank_pattern", True)
        ranks = dict.fromkeys(hits, rank) | ranks  # the first match wins
    found = {name: ranks.get(name, config.rank) for name in targets}
    refuse_mixed_ranks(found, modules)
    return found
