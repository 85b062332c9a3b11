"""Refuse layers that cannot be converted, before any work, and say the remedy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_pmss.conversion.experts import refuse_experts, without_experts
from lightning_pmss.conversion.matrices import refuse_matrices
from lightning_pmss.layers.convertible import is_known, is_supported, why_no_own_weight
from lightning_pmss.layers.operators import CONVERTED, operator_of, why_not_applied
from lightning_pmss.layers.parts import is_dtensor
from lightning_pmss.layers.quantised import why_unusable
from lightning_pmss.layers.shared_memory import is_expanded, shares_memory
from lightning_pmss.messages import some
from lightning_pmss.methods.given import Given
from lightning_pmss.methods.method import Method


def refuse_unconvertible(
    targets: list[str],
    modules: Mapping[str, nn.Module],
    method: Method[Any],
    given: Given | None,
    *,
    derived_later: bool = False,
) -> None:
    """Refuse layers that cannot be converted, before any work.

    Args:
        targets: Names of the layers.
        modules: All modules by name.
        method: The method.
        given: What is known of the layers.
        derived_later: Whether weights on the meta device are allowed, since they are read from files.
    """
    owners: dict[int, list[str]] = {}
    for name, module in without_experts(modules).items():
        for parameter in _parameters_used(module):
            owners.setdefault(id(parameter), []).append(name)
    refuse_experts(targets, modules, method, given, owners, derived_later)
    refuse_matrices(targets, modules, method, given, owners, derived_later)
    targets = list(without_experts({n: modules[n] for n in targets}))
    usable = [n for n in targets if why_unusable(modules[n]) is None and is_supported(modules[n])]
    sharing = shares_memory(usable, modules)
    for name in targets:
        layer = modules[name]
        if reason := why_unusable(layer):
            raise ValueError(f"`{name}` ({type(layer).__name__}) {reason}")
        if reason := why_not_applied(layer) or (method.why_not_applied(layer) if operator_of(layer) else None):
            raise ValueError(
                f"`{name}` ({type(layer).__name__}) {reason}. To leave it frozen, take it out of target_modules or list it in"
                f" exclude_modules; to train it in full, type also_train=[{name!r}]."
            )
        if reason := why_no_own_weight(layer):
            raise ValueError(
                f"`{name}` ({type(layer).__name__}): {reason}. lightning-pmss converts layers that own a plain weight. Take it"
                " out of target_modules or list it in exclude_modules; of torch's parametrisations, norms and pruning the"
                " result can be kept as a plain weight first (`remove_parametrizations`, `remove_weight_norm`,"
                " `prune.remove`)."
            )
        if not is_supported(layer):
            raise ValueError(
                f"`{name}` is a {type(layer).__name__} whose weight cannot be read as a floating-point matrix; lightning-pmss"
                f" converts {CONVERTED}. Take it out of target_modules or list it in exclude_modules."
            )
        weight: Tensor = layer.weight  # type: ignore[assignment]
        if len(shared := owners[id(weight)]) > 1:
            others = [n for n in shared if n != name]
            raise ValueError(
                f"`{name}` shares its weight with {some(others)}: a change to one would change both; exclude it."
            )
        if name in sharing:
            raise ValueError(
                f"`{name}` shares the memory of its weight with {some(sharing[name])}: a change to one would change both;"
                " exclude it, or give it a copy (`layer.weight = nn.Parameter(layer.weight.detach().clone())`)."
            )
        if is_expanded(weight):
            raise ValueError(
                f"`{name}` has a weight that is expanded from fewer numbers, which cannot be changed one by one; exclude it, or"
                " give it a copy (`layer.weight = nn.Parameter(layer.weight.detach().clone())`)."
            )
        if is_dtensor(weight):
            raise ValueError(
                f"`{name}` is already sharded; convert before `fully_shard`: call `model_built(self)` in `configure_model`"
                " (PMSSCallback converts there), or `convert(model, config)`."
            )
        if given is not None:
            given.refuse_lacking(name, method.derived)
        if weight.is_meta and not derived_later and (reason := method.why_underived(given, name)):
            raise ValueError(f"`{name}` {reason}")
        if name.endswith("out_proj") and isinstance(modules.get(name.rpartition(".")[0]), nn.MultiheadAttention):
            raise ValueError(f"`{name}` belongs to nn.MultiheadAttention, which never calls its forward; exclude it.")
        method.refuse(layer, name)


def _parameters_used(module: nn.Module) -> list[Tensor]:
    """A module's own parameters, and a weight of another module that it uses as its attribute or property."""
    own: list[Tensor] = list(module.parameters(recurse=False))
    if is_known(module) and "weight" not in module._parameters and "parametrizations" not in module._modules:
        own += [w for w in [getattr(module, "weight", None)] if isinstance(w, nn.Parameter)]
    return own
