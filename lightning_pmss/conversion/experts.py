"""Parameters as targets: `target_parameters`, and fused experts that cannot be converted."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from lightning_pmss.conversion.expression import Expression
from lightning_pmss.conversion.roots import why_no_matrix_layer
from lightning_pmss.layers.convertible import is_linear
from lightning_pmss.layers.expert_layer import ExpertLinear, is_fused_experts, parameter_name, projections
from lightning_pmss.layers.matrix_layer import MatrixLinear, OwnedLinear
from lightning_pmss.layers.operators import operator_of
from lightning_pmss.layers.parts import whole_shape
from lightning_pmss.messages import some
from lightning_pmss.methods.given import Given
from lightning_pmss.methods.method import Method


def without_experts(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The modules that the model itself has."""
    return {name: module for name, module in modules.items() if not isinstance(module, OwnedLinear)}


def matrices_in(names: Iterable[str], modules: Mapping[str, nn.Module]) -> dict[str, MatrixLinear]:
    """The layers among these that are parameters of two dimensions."""
    return {name: module for name in names if isinstance(module := modules[name], MatrixLinear)}


def experts_by_parameter(names: Iterable[str], modules: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """Names of the experts' layers, in order, by the name of the parameter that they are in."""
    found: dict[str, list[str]] = {}
    for name in names:
        if isinstance(modules[name], ExpertLinear):
            found.setdefault(parameter_name(name), []).append(name)
    return found


def parameter_names(name: str, modules: Mapping[str, nn.Module]) -> list[str]:
    """The parameter's name of an expert's layer; none of other layers."""
    return [parameter_name(name)] if isinstance(modules[name], ExpertLinear) else []


def ends_in(pattern: str, name: str) -> bool:
    """Whether a name is a pattern, or ends in it behind a dot."""
    return name == pattern or name.endswith(f".{pattern}")


def match_parameters(
    patterns: str | Sequence[str], modules: Mapping[str, nn.Module], owners: Sequence[tuple[str, nn.Module]]
) -> list[str]:
    """Names of the layers in the parameters that ``target_parameters`` names: experts, or the parameter itself.

    Args:
        patterns: A regular expression or a list of names and name endings.
        modules: Result of `canonical_modules`.
        owners: Result of `canonical_owners`.

    Raises:
        ValueError: A pattern matches nothing, a module, or a parameter of another kind.
    """
    fused = experts_by_parameter(modules, modules) | {name: [name] for name in matrices_in(modules, modules)}
    every = _every(owners)
    listed = _listed(patterns, every)
    if isinstance(listed, str):
        expression = Expression(listed, "target_parameters")
        hits = [name for name in every if expression.matches(name)]
        usable = [name for name in hits if name in fused]
        if not usable:
            _refuse(listed, hits, [n for n in modules if expression.matches(n)], every, fused)
        return [layer for name in usable for layer in fused[name]]
    found: dict[str, None] = {}
    for pattern in listed:
        hits = [name for name in every if ends_in(str(pattern), name)]
        if not hits or any(name not in fused for name in hits):
            others = [name for name in hits if name not in fused]
            _refuse(str(pattern), others, [n for n in modules if ends_in(str(pattern), n)], every, fused)
        found |= {layer: None for name in hits for layer in fused[name]}
    return list(found)


def asked_parameters(patterns: str | Sequence[str], owners: Sequence[tuple[str, nn.Module]]) -> list[str]:
    """Names of all parameters that ``target_parameters`` matches, whatever they are."""
    every = _every(owners)
    listed = _listed(patterns, every)
    if isinstance(listed, str):
        expression = Expression(listed, "target_parameters")
        return [name for name in every if expression.matches(name)]
    return [name for name in every if any(ends_in(str(pattern), name) for pattern in listed)]


def _every(owners: Sequence[tuple[str, nn.Module]]) -> dict[str, tuple[str, nn.Module, str]]:
    """(name of the module, the module, key) of all parameters by name."""
    return {
        f"{name}.{key}".lstrip("."): (name, m, key)
        for name, m in owners
        for key, parameter in m._parameters.items()
        if parameter is not None
    }


def _listed(patterns: str | Sequence[str], every: Iterable[str]) -> str | Sequence[str]:
    lone = isinstance(patterns, str) and any(ends_in(patterns, name) for name in every)
    return [patterns] if lone else patterns  # type: ignore[list-item]


def _refuse(
    pattern: str,
    hits: Sequence[str],
    modules: Sequence[str],
    every: Mapping[str, tuple[str, nn.Module, str]],
    fused: Mapping[str, Any],
) -> None:
    """Raise ValueError for a pattern that names no parameter that can be converted."""
    what = f"target_parameters: {pattern!r}"
    if hits:
        owner, module, key = every[hits[0]]
        kind, shape = type(module).__name__, list(whole_shape(module._parameters[key]))  # type: ignore[arg-type]
        of = f"{what} is a parameter {shape} of the {kind}" + (f" `{owner}`" if owner else "")
        if is_linear(module):
            raise ValueError(f"{of}, a linear layer. Name that in target_modules: type {owner!r}.")
        if operator_of(module) is not None:
            raise ValueError(f"{of}, which is converted as a layer. Name that in target_modules: type {owner!r}.")
        reason = why_no_matrix_layer(owner, module, key)
        raise ValueError(
            f"{of}. {reason}, so take it out; it stays frozen"
            + (f", or is trained in full with also_train=[{owner!r}]." if owner else ".")
        )
    if modules:
        raise ValueError(f"{what} is a module, not a parameter. Name it in target_modules: type {modules[0]!r} there.")
    if not fused:
        raise ValueError(
            f"{what} matches no parameter, and the model has no fused experts. Type a parameter's full name or its end; linear"
            " layers are named in target_modules."
        )
    known = {name.rpartition(".")[2] for name in fused} | set(fused)
    close = difflib.get_close_matches(pattern, sorted(known), n=4, cutoff=0.4) or sorted(known)[:8]
    raise ValueError(f"{what} matches no parameter; closest names: {', '.join(close)}.")


def refuse_experts(
    targets: Sequence[str],
    modules: Mapping[str, nn.Module],
    method: Method[Any],
    given: Given | None,
    owners: Mapping[int, Sequence[str]],
    derived_later: bool = False,
) -> None:
    """Refuse fused experts that cannot be converted, before any work.

    Args:
        targets: Names of all layers to convert.
        modules: Result of `canonical_modules`.
        method: The method.
        given: What is known of the layers.
        owners: Names of the modules that use a parameter, by its ``id``.
        derived_later: Whether weights on the meta device are allowed, since they are read from files.
    """
    for name, group in experts_by_parameter(targets, modules).items():
        layer = modules[group[0]]
        assert isinstance(layer, ExpertLinear)
        where = f"`{name}` ({type(layer.owner).__name__})"
        leave = f"type exclude_modules=[{name.rpartition('.')[2]!r}]"
        parameter = layer.owner._parameters[layer.key]
        if len(group) != (count := whole_shape(parameter)[0]):
            raise ValueError(
                f"{where}: {len(group)} of its {count} experts were asked for. Experts of one parameter are converted"
                f" together: name the parameter, or {leave}."
            )
        if reason := layer.why_unusable():
            raise ValueError(f"{where}: {reason}. Load plain weights on one process, or {leave}.")
        if len(shared := owners[id(parameter)]) > 1:
            raise ValueError(f"{where} is shared by {some(list(shared))}: a change to one would change both; {leave}.")
        if parameter.is_meta and not derived_later:
            raise ValueError(f"{where} is on the meta device; load its weights before it is converted, or {leave}.")
        if reason := method.why_no_experts():
            raise ValueError(f"{where} {reason}, or {leave}.")
        for expert in group:
            if given is not None:
                given.refuse_lacking(expert, method.derived)
            method.refuse(modules[expert], expert)


def refuse_mixed_ranks(ranks: Mapping[str, int], modules: Mapping[str, nn.Module]) -> None:
    """Refuse several ranks in one parameter, whose experts are stacked."""
    for name, group in experts_by_parameter(ranks, modules).items():
        if len(found := sorted({ranks[expert] for expert in group})) > 1:
            raise ValueError(
                f"rank_pattern: `{name}` has experts of the ranks {found}, and all of one parameter have the same: type"
                f" {name.rpartition('.')[2]!r} or the parameter's whole name as the key."
            )


def fused_parameters(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """(module, name) of the parameters of fused experts in a model."""
    return [(m, key) for m in model.modules() if is_fused_experts(m) for key in projections(m)]
