"""Canonical names of a model's modules, and the root that they are relative to."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence

from torch import nn

from lightning_pmss.conversion.left_out import resting
from lightning_pmss.layers.convertible import is_known
from lightning_pmss.layers.expert_layer import expert_layers, is_fused_experts
from lightning_pmss.layers.matrices import matrix_layers
from lightning_pmss.layers.matrix_layer import MatrixLinear, why_no_matrix
from lightning_pmss.layers.parts import clean_name

_ROOT = "pmss_root"  # attribute in which a conversion stores its root, relative to that module


def adapted_root(model: nn.Module, root: str | None = None) -> tuple[nn.Module, str]:
    """Module inside ``model`` that names are relative to, and its dotted prefix.

    A root that a conversion stored is used first, then the outermost Hugging Face model if there is exactly one, then
    ``model`` itself.

    Args:
        model: Any module.
        root: Full name of a module to use instead, such as the one in an adapter file.
    """
    named = {clean_name(name): module for name, module in model.named_modules()}
    if root is None:
        root = noted_root(model)
    if root is None:
        found = _hugging_face_models(named)
        root = found[0] if len(found) == 1 else ""
    return named[root], f"{root}." if root else ""


def noted_root(model: nn.Module) -> str | None:
    """Full name of the root that a conversion of the whole model stored; None if it stored none."""
    named = {clean_name(name): module for name, module in model.named_modules()}
    noted = {n: m for n, m in named.items() if _ROOT in m.__dict__}
    for outer, holder in noted.items():
        root = f"{outer}.{holder.__dict__[_ROOT]}".strip(".")
        if root in named and (outer == "" or len(list(holder.parameters())) == len(list(model.parameters()))):
            return root
    return None


def choose_root(model: nn.Module, wanted: str | None) -> str:
    """Choose the root of a conversion; return its full name, "" for the model itself.

    Args:
        model: A model before its conversion.
        wanted: Option ``root`` of the config. A single Hugging Face model inside that module is chosen instead of it.

    Raises:
        ValueError: No module has the name ``wanted``.
    """
    named = {clean_name(name): module for name, module in model.named_modules()}
    if wanted is None:
        tops = resting(model).names
        found = [n for n in _hugging_face_models(named) if not below(n, list(tops))]
        return found[0] if len(found) == 1 else ""
    if wanted not in named or not wanted:
        close = difflib.get_close_matches(wanted, [n for n in named if n], n=4, cutoff=0.4)
        known = close or [n for n in named if n and "." not in n][:8]
        raise ValueError(
            f"root={wanted!r} is no module of this {type(model).__name__}; closest names: {', '.join(known)}."
        )
    found = [n for n in _hugging_face_models(named) if below(n, [wanted])]
    return found[0] if len(found) == 1 else wanted


def settle_root(model: nn.Module, root: str) -> None:
    """Store the chosen root where `adapted_root` finds it, also from a module around ``model``."""
    if adapted_root(model)[1].removesuffix(".") != root:
        {clean_name(name): module for name, module in model.named_modules()}[""].__dict__[_ROOT] = root


def hugging_face_models(model: nn.Module) -> list[nn.Module]:
    """The outermost Hugging Face models inside a model."""
    named = {clean_name(name): module for name, module in model.named_modules()}
    return [named[name] for name in _hugging_face_models(named)]


def _hugging_face_models(named: Mapping[str, nn.Module]) -> list[str]:
    """Names of the outermost Hugging Face models."""
    found: list[str] = []
    for name, module in named.items():
        if is_hugging_face(module) and not any(outer == "" or below(name, [outer]) for outer in found):
            found.append(name)
    return found


def canonical_modules(
    model: nn.Module, root: str | None = None, parameters: Collection[str] = ()
) -> dict[str, nn.Module]:
    """All modules by canonical name: relative to the root (see `adapted_root`) inside it, the full name outside.

    Therefore an adapter trained inside a LightningModule loads into the plain model. If two names collide, all names stay full.
    The matrices of fused experts are among them (`lightning_pmss.layers.expert_layer`), though no model has them as modules:
    ``model.layers.0.mlp.experts.gate_up_proj.3``. So are matrices that are parameters of other modules
    (`lightning_pmss.layers.matrix_layer`), if they are converted or asked for: ``encoder.self_attn.in_proj_weight``.

    Args:
        model: Any module.
        root: See `adapted_root`.
        parameters: Names of parameters to have as layers; those that cannot be one are left out.
    """
    found: dict[str, nn.Module] = {}
    for name, module in canonical_owners(model, root):
        if name:
            found[name] = module
        if is_fused_experts(module):
            found |= {f"{name}.{own}".lstrip("."): layer for own, layer in expert_layers(module).items()}
        known = matrix_layers(module)
        for key in module._parameters:
            full = f"{name}.{key}".lstrip(".")
            if key in known:
                found[full] = known[key]
            elif full in parameters and why_no_matrix_layer(name, module, key) is None:
                found[full] = MatrixLinear(module, key)
    return found


def why_no_matrix_layer(name: str, module: nn.Module, key: str) -> str | None:
    """Why a parameter cannot be converted as a matrix, behind "a parameter [..] of the X", a sentence; None if it can.

    Args:
        name: Canonical name of the module.
        module: Owner of the parameter.
        key: The parameter's name in it.
    """
    if module._parameters.get(key) is None:
        return "It is not set"
    if not name or is_hugging_face(module):
        return "It belongs to the model itself, not to a module in it"
    if is_known(module):
        return "It belongs to a layer that is converted as a whole"
    if is_fused_experts(module):
        return "It belongs to fused experts, of which `gate_up_proj` and `down_proj` are converted"
    return why_no_matrix(module, key)


def canonical_owners(model: nn.Module, root: str | None) -> list[tuple[str, nn.Module]]:
    """(canonical name, module) of all modules, including the model and the root, whose names are empty."""
    _, prefix = adapted_root(model, root)
    # A wrapper and its wrapped module have the same clean name; the wrapped module comes later and replaces the wrapper.
    named = {clean_name(name): module for name, module in model.named_modules()}
    short = [(f"{name}.".removeprefix(prefix).removesuffix("."), module) for name, module in named.items()]
    names = [name for name, _ in short if name]
    return short if len(set(names)) == len(names) else list(named.items())


def below(name: str, roots: Sequence[str]) -> bool:
    """Whether a module is one of these roots or inside one of them, by name."""
    return any(name == root or name.startswith(f"{root}.") for root in roots)


def is_hugging_face(module: nn.Module) -> bool:
    """Whether this is a model of transformers (recognised by name, since the core never imports it)."""
    return any(
        c.__name__ == "PreTrainedModel" and c.__module__.startswith("transformers.") for c in type(module).__mro__
    )
