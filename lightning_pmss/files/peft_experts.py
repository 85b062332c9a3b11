"""Fused experts in peft's files: what its ``target_parameters`` reads, and what it confuses."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_pmss.layers.expert_layer import is_expert_name, parameter_name

# peft takes modules of these names for experts of an older transformers, and their fused parameters in their place.
_TAKEN = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


def experts_of(names: Iterable[str]) -> dict[str, list[str]]:
    """The layers of each parameter of fused experts, in the order of the experts."""
    found: dict[str, list[str]] = {}
    for name in filter(is_expert_name, names):
        found.setdefault(parameter_name(name), []).append(name)
    return {name: sorted(group, key=lambda layer: int(layer.rpartition(".")[2])) for name, group in found.items()}


def confused_layer(names: Iterable[str]) -> str | None:
    """A linear layer beside fused experts whose name peft takes for experts; None where there is none."""
    known = list(names)
    if not experts_of(known):
        return None
    return next((n for n in known if not is_expert_name(n) and n.rpartition(".")[2] in _TAKEN), None)


def refuse_confused_experts(names: Iterable[str]) -> None:
    """Refuse an adapter of experts that has also linear layers whose names peft takes for experts.

    Raises:
        ValueError: Names such a layer.
    """
    if taken := confused_layer(names):
        raise ValueError(
            f"{taken} is a linear layer beside fused experts, and peft takes modules of this name for experts, so it loads"
            " another model. Merge instead: `python -m lightning_pmss merge`; or train without such layers:"
            " exclude_modules=['shared_experts', ...], or without the experts: exclude_modules=['experts']."
        )
