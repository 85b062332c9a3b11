"""What a checkpoint says of itself: enough to write its adapter without the program that trained it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lightning_pmss.checkpoint_record import FORMAT_VERSION
from lightning_pmss.conversion import conversion_of, pmss_layers
from lightning_pmss.files.adapter import class_path, linear_left_out, other_names, tensors_of
from lightning_pmss.files.base import base_of
from lightning_pmss.files.plain import quantisation_settings
from lightning_pmss.fingerprint import fingerprint
from lightning_pmss.layers import canonical_shape
from lightning_pmss.quantised import quantisation_of
from lightning_pmss.roots import adapted_root, canonical_modules, noted_root
from lightning_pmss.whole import clean_name, is_sharded


def describe(module: nn.Module, trained: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The ``pmss`` entry of a checkpoint, as `CheckpointRecord` has it; on a sharded model a collective.

    Args:
        module: The converted LightningModule.
        trained: Keys and shapes of the tensors that the checkpoint keeps.
    """
    report, layers = conversion_of(module), pmss_layers(module)
    assert report is not None
    names = {id(m): clean_name(name) for name, m in module.named_modules()}
    modules = {
        name: {
            "key": names[id(layer)],
            "shape": list(canonical_shape(layer)),
            "layout": "conv1d" if layer.transposed else "linear",
            "frame_dtype": None if layer.frame_dtype is None else str(layer.frame_dtype).removeprefix("torch."),
            "fingerprint": dict(layer.fingerprint or fingerprint(*layer.slices())),
        }
        for name, layer in layers.items()
    }
    named = canonical_modules(module)
    keys = {
        f"{name}.{key.removeprefix(f'{names[id(named[name])]}.')}": key
        for name in report.also_train
        for key in trained
        if key.startswith(f"{names[id(named[name])]}.")
    }
    live = dict.fromkeys(keys, torch.empty(0)) if is_sharded(module) else tensors_of(report.also_train, named)
    tied = other_names(live, module)
    root, base = adapted_root(module)[0], base_of(module)
    return {
        "format_version": FORMAT_VERSION,
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
            name: {"key": key, "shape": list(trained[key]), "tied": tied.get(name, [])} for name, key in keys.items()
        },
    }
