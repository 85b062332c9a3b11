"""Write the skeleton of a converted model; `lightning_pmss.skeleton` has the format, `select_files` works from disk."""

from __future__ import annotations

import json
import os
from pathlib import Path

from torch import Tensor, nn

from lightning_pmss.conversion import conversion_of, pmss_layers
from lightning_pmss.files.pieces import sync
from lightning_pmss.files.shards import save_tensors
from lightning_pmss.fingerprint import fingerprint
from lightning_pmss.layers import Frame, canonical_shape
from lightning_pmss.reading import describe_tensors
from lightning_pmss.skeleton import FORMAT_VERSION, METADATA


def save_skeleton(model: nn.Module, file: str | os.PathLike[str]) -> Path:
    """Write rows, columns, coordinates and fingerprints of a converted model, for ``skeleton_file=``.

    For models that `python -m lightning_pmss select` cannot build from a folder. Whole weights only: convert on the CPU
    once, save, and every sharded or meta-device run converts from the file.

    Args:
        model: Converted by `convert`, not merged and not sharded.
        file: The safetensors file to write; an existing one is replaced.

    Raises:
        ValueError: The model is not converted.
    """
    report = conversion_of(model)
    if report is None:
        raise ValueError(f"{type(model).__name__} has no converted layer. Call convert(model, config) first.")
    residuals = {layer.name: layer.residual for layer in report.layers}
    tensors: dict[str, Tensor] = {}
    modules = {}
    for name, layer in pmss_layers(model).items():
        own = {"rows": layer.rows.int(), "cols": layer.cols.int()}
        for part in Frame._fields if layer.core.frame is not None else ():
            if (factor := getattr(layer.core.frame, part)) is not None:
                own[part] = factor
        tensors |= {f"{name}.{part}": value for part, value in own.items()}
        modules[name] = {
            "shape": list(canonical_shape(layer)),
            "fingerprint": fingerprint(*layer.slices()),
            "residual": residuals[name],
            "tensors": describe_tensors(own),
        }
    about = {
        "format_version": FORMAT_VERSION,
        "options": report.config.to_dict(),
        "coordinates": report.config.coordinates,
        "base": None,
        "modules": modules,
    }
    target = Path(file).expanduser()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        save_tensors(tensors, temporary, {METADATA: json.dumps(about)})
        sync(temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target
