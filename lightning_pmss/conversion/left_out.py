"""Parts of a model that a conversion leaves unchanged, with reasons: heads, resting networks, weights of other modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import nn

from lightning_pmss.layers.convertible import is_linear
from lightning_pmss.layers.expert_layer import is_fused_experts, projections
from lightning_pmss.layers.parts import clean_name, whole_shape
from lightning_pmss.layers.quantised import quantisation_of

EXCLUDED = "excluded"
IN_FULL = "trained in full"
HEAD = "output head"
ASLEEP = "frozen and in eval mode"
IN_METRIC = "inside a torchmetrics Metric"
UNTARGETED = "not in target_modules"
UNNAMED = "fused experts, not in target_parameters"


class LeftOut(NamedTuple):
    """Parts of a model that are not converted.

    Attributes:
        reasons: Reason by canonical name of linear layers, and of other modules' parameters of two and more dimensions.
        unowned: Names of the parameters among them that no option converts.
        asleep: Names of the topmost modules that were frozen and in eval mode while others were not.
    """

    reasons: dict[str, str]
    unowned: list[str]
    asleep: list[str]


class Resting(NamedTuple):
    """Networks inside a model that are not meant to be trained.

    Attributes:
        names: Clean full names of the topmost modules, with the reason.
        modules: Reason by id of each module inside them, except modules that the rest of the model also uses.
    """

    names: dict[str, str]
    modules: dict[int, str]


def resting(model: nn.Module) -> Resting:
    """Find networks inside a torchmetrics Metric, and networks that are frozen and in eval mode while others are not.

    Examples are a perceptual loss network, a reference model and a teacher. If the whole model is frozen and in eval mode,
    none of it rests. Quantised weights are ignored, since they are always frozen.
    """
    found: dict[str, tuple[nn.Module, str]] = {}
    outside: set[int] = set()
    awake = False
    asleep = _asleep(model)

    def walk(name: str, module: nn.Module) -> None:
        nonlocal awake
        if name and not _is_metric(module) and id(module) in asleep and _has_parameters(module):
            found[name] = module, ASLEEP
            return
        outside.add(id(module))
        awake = awake or bool(_own(module))
        for key, child in module.named_children():
            if _is_metric(module) and _has_parameters(child):
                found[_join(name, key)] = child, IN_METRIC
            else:
                walk(_join(name, key), child)

    walk("", model)
    tops = {n: (m, why) for n, (m, why) in found.items() if id(m) not in outside and (awake or why == IN_METRIC)}
    inside = {id(m): why for top, why in tops.values() for m in top.modules() if id(m) not in outside}
    return Resting({clean_name(name): why for name, (_, why) in tops.items()}, inside)


def frozen_weights(
    name: str, module: nn.Module, accounted: set[int], below: Mapping[int, str]
) -> Iterator[tuple[str, str, bool]]:
    """Yield a module's own parameters of two and more dimensions that are not in ``accounted``, and add them to it.

    Args:
        name: Canonical name; "" for the model and its root.
        module: Module that owns the parameters.
        accounted: Ids of the parameters that are converted, trained in full, or listed already.
        below: Reason by id of module, for branches left out as a whole.

    Returns:
        (name, reason, whether no option converts it) of each; the name is the layer's if the module is a linear layer.
    """
    for key, parameter in module._parameters.items():
        if parameter is None or id(parameter) in accounted or len(whole_shape(parameter)) < 2:
            continue
        accounted.add(id(parameter))
        if id(module) in below:
            yield (name if is_linear(module) else _join(name, key)), below[id(module)], False
        elif is_linear(module):
            yield name, UNTARGETED, False
        else:
            fused = is_fused_experts(module) and key in projections(module)
            yield _join(name, key), UNNAMED if fused else _kind(module, len(whole_shape(parameter))), True


def _kind(module: nn.Module, dims: int) -> str:
    return _EMBEDDING if isinstance(module, nn.Embedding) else _of_class(dims, type(module))


def _of_class(dims: int, kind: type[nn.Module]) -> str:
    return f"{dims}-dimensional parameter of {kind.__name__}"


_EMBEDDING = "embedding"
NAMEABLE = {_EMBEDDING} | {_of_class(dims, kind) for dims, kind in ((3, nn.Conv1d), (4, nn.Conv2d), (5, nn.Conv3d))}
"""Reasons of layers that are converted where target_modules names them."""


def _asleep(model: nn.Module) -> set[int]:
    """Ids of the modules that are frozen and in eval mode with all their submodules."""
    found: set[int] = set()

    def look(module: nn.Module) -> bool:
        below = [look(child) for child in module.children()]
        if all(below) and not module.training and not any(p.requires_grad for p in _own(module)):
            found.add(id(module))
            return True
        return False

    look(model)
    return found


def _own(module: nn.Module) -> list[nn.Parameter]:
    """A module's own parameters that could require gradients."""
    if quantisation_of(module) is not None:
        return []
    return [p for p in module.parameters(recurse=False) if p.is_floating_point()]


def _has_parameters(module: nn.Module) -> bool:
    return any(_own(m) for m in module.modules())


def _is_metric(module: nn.Module) -> bool:
    return any(c.__name__ == "Metric" and c.__module__.startswith("torchmetrics.") for c in type(module).__mro__)


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)
