"""Make the ``pmss`` entry of a checkpoint, from which its adapter can be written without the training program."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_pmss.checkpoints.record import FORMAT_VERSION
from lightning_pmss.conversion.convert import adapted_layers, conversion_of
from lightning_pmss.conversion.roots import adapted_root, canonical_modules, noted_root
from lightning_pmss.files.adapter import class_path, linear_left_out, other_names
from lightning_pmss.files.base import base_of
from lightning_pmss.files.fresh import live_tensors, settings_of, untrained
from lightning_pmss.files.plain import quantisation_settings
from lightning_pmss.layers.convertible import canonical_shape
from lightning_pmss.layers.experts import names_of_modules
from lightning_pmss.layers.fingerprint import fingerprint
from lightning_pmss.layers.parts import clean_name
from lightning_pmss.layers.quantised import quantisation_of


class FullName(NamedTuple):
    """Key of a checkpoint's tensor that belongs to no converted layer.

    Attributes:
        key: Key in the state dict; the first name of a tied tensor.
        tied: Other canonical names of the tensor.
    """

    key: str
    tied: list[str]


def full_names(module: nn.Module) -> dict[str, FullName]:
    """Tensors trained in full, and tensors missing in the base's files, by canonical name.

    Call it before a strategy wraps the module.
    """
    report, named = conversion_of(module), canonical_modules(module)
    assert report is not None
    live: dict[str, Tensor] = {clean_name(n): t for n, t in module.named_parameters(remove_duplicate=False)}
    live |= {clean_name(n): t for n, t in module.named_buffers(remove_duplicate=False)}
    first: dict[int, str] = {}
    for key, tensor in live.items():
        first.setdefault(id(tensor), key)
    names = {id(m): clean_name(n) for n, m in module.named_modules()}
    found: dict[str, Tensor] = {}
    for name in report.also_train:
        start = f"{names[id(named[name])]}."
        own = {key.removeprefix(start): tensor for key, tensor in live.items() if key.startswith(start)}
        kept = {clean_name(key) for key in named[name].state_dict()}
        found |= {f"{name}.{key}": tensor for key, tensor in own.items() if key in kept}
    found |= live_tensors(module, untrained(report.fresh or {}, report))
    tied = other_names(found, module)
    return {
        name: FullName(first[id(tensor)], tied.get(name, [])) for name, tensor in found.items() if id(tensor) in first
    }


def describe(
    module: nn.Module, trained: Mapping[str, tuple[int, ...]], *, full: Mapping[str, FullName]
) -> dict[str, Any]:
    """Make the ``pmss`` entry of a checkpoint, see `CheckpointRecord`; a collective on a sharded model.

    Args:
        module: The converted LightningModule.
        trained: Shapes of the checkpoint's tensors by key.
        full: Result of `full_names`.
    """
    report, layers = conversion_of(module), adapted_layers(module)
    assert report is not None
    names = names_of_modules(module)
    modules = {
        name: {
            "key": names[id(layer)],
            "shape": list(canonical_shape(layer)),
            "layout": str(layer.layout),
            "frame_dtype": None if layer.derived_dtype is None else str(layer.derived_dtype).removeprefix("torch."),
            "fingerprint": dict(layer.fingerprint or fingerprint(*layer.reads())) or None,
            "rank": layer.rank,
        }
        for name, layer in layers.items()
    }
    starts = untrained(report.fresh or {}, report)
    root, base = adapted_root(module)[0], base_of(module)
    return {
        "format_version": FORMAT_VERSION,
        "method": report.config.method,
        "config": report.config.to_dict(),
        "base": {
            "name": base.name,
            "revision": base.revision,
            "model_class": class_path(root),
            "quantisation": sorted(q for q in {quantisation_of(m, m.pristine) for m in layers.values()} if q),
            "quantisation_settings": quantisation_settings(root),
        },
        "root": noted_root(module),
        "left_out": linear_left_out(module),
        "modules": modules,
        "full_modules": list(report.also_train),
        "also_train": {
            name: {"key": where.key, "shape": list(trained[where.key]), "tied": where.tied}
            for name, where in full.items()
            if name not in starts
        },
        "fresh": {
            name: {"key": where.key, "shape": list(trained[where.key]), "tied": where.tied, "start": starts[name]}
            for name, where in full.items()
            if name in starts and where.key in trained
        },
        "settings": settings_of(module, report.fresh or {}),
    }
