"""Matrices in parameters of other modules as targets: what cannot be converted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lightning_pmss.conversion.experts import asked_parameters, matrices_in
from lightning_pmss.conversion.roots import canonical_modules, canonical_owners, why_no_matrix_layer
from lightning_pmss.layers.expert_layer import is_expert_name
from lightning_pmss.layers.experts import AdaptedExperts
from lightning_pmss.layers.matrices import matrix_layers
from lightning_pmss.layers.parts import whole_shape
from lightning_pmss.layers.shared_memory import is_expanded, shares_memory
from lightning_pmss.messages import kind_of, some
from lightning_pmss.methods.config import AdapterConfig
from lightning_pmss.methods.given import Given
from lightning_pmss.methods.method import Method


def modules_for(model: nn.Module, config: AdapterConfig, root: str | None = None) -> dict[str, nn.Module]:
    """`canonical_modules` with the parameters that a config asks for."""
    return canonical_modules(model, root, asked_parameters(config.target_parameters, canonical_owners(model, root)))


def refuse_matrices(
    targets: Sequence[str],
    modules: Mapping[str, nn.Module],
    method: Method[Any],
    given: Given | None,
    owners: Mapping[int, Sequence[str]],
    derived_later: bool = False,
) -> None:
    """Refuse parameters that cannot be converted, before any work; arguments as of `refuse_experts`."""
    matrices = matrices_in(targets, modules)
    usable = [name for name, layer in matrices.items() if layer.why_unusable() is None]
    sharing = shares_memory(usable, modules) if usable else {}
    for name, layer in matrices.items():
        where = f"`{name}` ({type(layer.owner).__name__})"
        leave = "take it out of target_parameters"
        if reason := layer.why_unusable():
            raise ValueError(f"{where}: {reason}. Load plain weights on one process, or {leave}.")
        if isinstance(layer.owner, AdaptedExperts):
            raise ValueError(f"{where} belongs to fused experts that are converted: {leave}.")
        if len(shared := owners.get(id(layer.weight), ())) > 1:
            raise ValueError(f"{where} is shared by {some(list(shared))}: a change to one would change both; {leave}.")
        if name in sharing or is_expanded(layer.weight):
            with_ = (
                f"shares the memory of {some(sharing[name])}" if name in sharing else "is expanded from fewer numbers"
            )
            raise ValueError(f"{where} {with_}: a change to one number would change several; {leave}.")
        if layer.weight.is_meta and not derived_later:
            raise ValueError(f"{where} is on the meta device; load its weights before it is converted, or {leave}.")
        if reason := method.why_no_matrix_parameter():
            raise ValueError(f"{where} {reason}, or {leave}.")
        if given is not None:
            given.refuse_lacking(name, method.derived)
        method.refuse(layer, name)


def matrices_beside(model: nn.Module, names: Sequence[str], root: str | None = None) -> list[str]:
    """Parameters that could be converted, of the same kinds as others that are, but not among them.

    Args:
        model: Any module.
        names: Of converted layers; those that are no parameters of the model do not matter.
        root: See `adapted_root`.
    """
    found = {}
    for name, module in canonical_owners(model, root):
        for key, parameter in module._parameters.items():
            full = f"{name}.{key}".lstrip(".")
            if parameter is None or len(whole_shape(parameter)) != 2 or is_expert_name(full):
                continue
            if key in matrix_layers(module) or why_no_matrix_layer(name, module, key) is None:
                found[full] = kind_of(full)
    kinds = {found[name] for name in names if name in found}
    return [name for name, kind in found.items() if kind in kinds and name not in set(names)]
