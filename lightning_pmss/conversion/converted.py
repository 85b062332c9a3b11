"""Find the converted layers of a model, whether it was converted as a whole or its submodules were converted separately."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import nn

from lightning_pmss.conversion.left_out import ASLEEP, EXCLUDED, IN_METRIC, LeftOut
from lightning_pmss.conversion.report import ConversionReport, LayerReport
from lightning_pmss.conversion.roots import adapted_root, below, canonical_modules, canonical_owners
from lightning_pmss.conversion.targets import outside_of
from lightning_pmss.layers.adapted import AdaptedLinear
from lightning_pmss.layers.convertible import canonical_shape, is_linear
from lightning_pmss.layers.expert_layer import parameter_name
from lightning_pmss.layers.parts import clean_name
from lightning_pmss.messages import some
from lightning_pmss.methods.config import AdapterConfig

_REPORT = "pmss_report"
_ONCE = "Build a fresh model and convert it as a whole, once; rank_pattern={...} gives some layers another rank."


class _Known(NamedTuple):
    """Report of a converted layer, with the module and config of its conversion."""

    part: str
    config: AdapterConfig
    report: LayerReport


def conversion_of(model: nn.Module, root: str | None = None) -> ConversionReport | None:
    """Report of the conversion of the model as a whole; None without one. ``root`` as in `adapted_root`."""
    report: ConversionReport | None = adapted_root(model, root)[0].__dict__.get(_REPORT)
    return report


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """Converted layers by canonical name; those in the model's report, if it has one."""
    layers = {name: m for name, m in canonical_modules(model).items() if isinstance(m, AdaptedLinear)}
    if (report := conversion_of(model)) is None:
        return layers
    return {layer.name: layers[layer.name] for layer in report.layers if layer.name in layers}


def converted(model: nn.Module, purpose: str) -> tuple[ConversionReport, dict[str, AdaptedLinear]]:
    """Report and layers of a converted model.

    Args:
        model: Any module.
        purpose: Verb for the error message, such as "save".

    Raises:
        ValueError: The model as a whole was not converted.
    """
    report, layers = conversion_of(model), adapted_layers(model)
    if report is not None and layers:
        return report, layers
    kind = type(model).__name__
    if not layers:
        raise ValueError(
            f"{kind} has no converted layer to {purpose}. Call convert or load_adapter first: convert(model, config)."
        )
    if parts := list(parts_of(model)):
        raise ValueError(
            f"{some(parts)} of this {kind} were converted separately, the {kind} as a whole was not. Either"
            f" {purpose} them one by one, or call convert(model, config) with their config first, which joins them."
        )
    raise ValueError(
        f"the converted layers of this {kind} ({some(list(layers))}) belong to the conversion of a larger model: {purpose}"
        " that one."
    )


def chosen_scope(model: nn.Module) -> str | None:
    """Clean full name of the module that the config's ``root`` names; None if it names none."""
    report, (_, prefix) = conversion_of(model), adapted_root(model)
    if report is None or report.config.root is None:
        return None
    parts = prefix.removesuffix(".").split(".")
    names = [".".join(parts[: count + 1]) for count in range(len(parts))]
    return next((n for n in names if n and f".{n}".endswith(f".{report.config.root}")), None)


def beside_root(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Select the canonical names of modules outside the root; these are full names."""
    inside = {clean_name(name) for name, _ in adapted_root(model)[0].named_modules()}
    return [name for name in names if name not in inside]


def frozen_but_fresh(module: nn.Module) -> set[str]:
    """Clean full names of the frozen parameters in `ConversionReport.fresh`."""
    report = conversion_of(module)
    fresh = set() if report is None else set(report.fresh or ())
    owners = {id(owner): name for name, owner in canonical_owners(module, None)}
    return {
        f"{clean_name(full)}.{key}".lstrip(".")
        for full, owner in module.named_modules()
        for key, parameter in owner._parameters.items()
        if parameter is not None and f"{owners.get(id(owner))}.{key}".lstrip(".") in fresh
    }


def parts_of(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that have a conversion report, by clean full name; "" is the model itself."""
    return {clean_name(n): m for n, m in model.named_modules() if _REPORT in m.__dict__}


def record(model: nn.Module, report: ConversionReport) -> None:
    """Store the report at the root, and delete the reports of submodules that it includes."""
    named = canonical_modules(model)
    ours = {id(named[layer.name]) for layer in report.layers}
    for part in parts_of(model).values():
        if any(id(m) in ours for m in part.modules()):
            del part.__dict__[_REPORT]
    adapted_root(model)[0].__dict__[_REPORT] = report


def changed_fields(old: AdapterConfig, new: AdapterConfig, *, inside: bool = False) -> list[str]:
    """Names of the fields in which two configs differ.

    ``root`` is not compared if the old config has none or if the model is the root itself.

    Args:
        old: Config of the earlier conversion.
        new: Config of the next conversion.
        inside: Whether the model is the root itself.
    """
    if type(old) is not type(new):
        return ["method"]
    there, here = old.to_dict(), new.to_dict()
    if inside or old.root is None:
        there["root"] = here["root"]
    return [field for field in here if there[field] != here[field]]


def is_complete(model: nn.Module, report: ConversionReport, root: str | None = None) -> bool:
    """Whether the report covers every linear layer of the model. ``root`` as in `adapted_root`."""
    known = {layer.name for layer in report.layers} | set(report.left_out)
    found = [n for n, m in canonical_modules(model, root).items() if is_linear(m) and not below(n, report.also_train)]
    return all(name in known or parameter_name(name) in known for name in found)


def is_converted(model: nn.Module) -> bool:
    """Whether the model was converted as a whole and has no linear layer added since."""
    report = conversion_of(model)
    return report is not None and is_complete(model, report)


def layers_to_keep(
    model: nn.Module,
    config: AdapterConfig,
    modules: Mapping[str, nn.Module],
    ranks: Mapping[str, int],
    left_out: LeftOut,
) -> dict[str, LayerReport]:
    """Reports of the targets that are converted already, by their present names.

    Args:
        model: The model to convert as a whole.
        config: Config of this conversion.
        modules: Result of `canonical_modules`.
        ranks: Rank by name of target.
        left_out: Parts of the model that are no targets.

    Raises:
        ValueError: A submodule was converted differently from this conversion.
    """
    aside = (EXCLUDED, ASLEEP, IN_METRIC, outside_of(config.root))
    before = {
        name: layer
        for name, layer in modules.items()
        if isinstance(layer, AdaptedLinear) and left_out.reasons.get(name) not in aside
    }
    known = _known_layers(model)
    kept = {}
    for name, layer in before.items():
        if id(layer) not in known:
            raise ValueError(
                f"`{name}` is converted already, but no conversion inside this {type(model).__name__} includes it: it belongs"
                " to a larger model, or was taken from one. Convert that one, or build the layer anew."
            )
        part, others, report = known[id(layer)]
        what = f"`{part}` was converted separately before" if part else "the model was converted before"
        changed = changed_fields(others, config)
        if config.root is not None and not below(part, [config.root]):
            changed.append("root")
        if changed:
            raise ValueError(f"{what}, with another config (differs in {', '.join(changed)}). {_ONCE}")
        if name not in ranks:
            reason = left_out.reasons.get(name, "not a target")
            raise ValueError(f"{what}, and now its `{name}` would be left out ({reason}). {_ONCE}")
        if report.rank != layer.method.rank_of(canonical_shape(layer), ranks[name]):
            raise ValueError(
                f"{what}, with rank {report.rank} of `{name}`; this conversion has rank {ranks[name]}. {_ONCE}"
            )
        if layer.merged:
            raise ValueError(f"{what}, and is merged: call `unmerge` on it first.")
        kept[name] = replace(report, name=name)
    return kept


def _known_layers(model: nn.Module) -> dict[int, _Known]:
    """Converted layers by id."""
    known = {}
    for part, module in parts_of(model).items():
        report: ConversionReport = module.__dict__[_REPORT]
        named = canonical_modules(module)
        for layer in report.layers:
            if layer.name in named:
                known[id(named[layer.name])] = _Known(part, report.config, layer)
    return known
