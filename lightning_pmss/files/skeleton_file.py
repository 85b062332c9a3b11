"""Write the skeleton of a converted model, in the format of `lightning_pmss.methods.skeleton`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_pmss.conversion.converted import converted
from lightning_pmss.layers.convertible import canonical_shape
from lightning_pmss.layers.fingerprint import fingerprint
from lightning_pmss.methods.config import AdapterConfig
from lightning_pmss.methods.pmss.config import PMSSConfig
from lightning_pmss.methods.skeleton import FORMAT_VERSION, METADATA
from lightning_pmss.store import describe_tensors, open_tensors
from lightning_pmss.store.disk import atomic_file
from lightning_pmss.store.shards import save_tensors


def save_skeleton(model: nn.Module, file: str | os.PathLike[str]) -> Path:
    """Write the frozen tensors and fingerprints of a converted model, for ``skeleton_file=``: PMSS's rows, columns and
    coordinates, or LoRA-XS's singular vectors.

    Use it for models that `python -m lightning_pmss select` cannot build from a folder: convert once on the CPU, save, and
    every sharded or meta-device run converts from the file.

    Args:
        model: Converted by `convert`, not merged and not sharded.
        file: The safetensors file to write; an existing skeleton file is replaced.

    Raises:
        FileExistsError: ``file`` exists and is not a skeleton file.
        ValueError: The model is not converted, or its method derives nothing from the weights.
    """
    target = Path(file).expanduser()
    refuse_others(target)
    report, found = converted(model, "save the skeleton of")
    if not report.config.per_matrix:
        raise ValueError(f"{report.config.label()} derives nothing from the weights, so it needs no skeleton file.")
    residuals = {layer.name: layer.residual for layer in report.layers}
    tensors: dict[str, Tensor] = {}
    modules = {}
    for name, layer in found.items():
        own = {part: index.int() for part, index in layer.indices().items()} | layer.core.frozen()
        tensors |= {f"{name}.{part}": value for part, value in own.items()}
        modules[name] = {
            "shape": list(canonical_shape(layer)),
            "fingerprint": fingerprint(*layer.reads()),
            "residual": residuals[name],
            "tensors": describe_tensors(own),
        }
    about = {
        "format_version": FORMAT_VERSION,
        **kind_of(report.config),
        "options": report.config.to_dict(),
        "base": None,
        "modules": modules,
    }
    with atomic_file(target) as temporary:
        save_tensors(tensors, temporary, {METADATA: json.dumps(about)})
    return target


def kind_of(config: AdapterConfig) -> dict[str, Any]:
    """The entries of the header that say whose tensors the file has: those of PMSS and CURLoRA are of one kind."""
    return {"coordinates": config.coordinates} if isinstance(config, PMSSConfig) else {"method": config.method}


def refuse_others(file: Path) -> None:
    """Refuse to replace an existing file that is not a skeleton file.

    Raises:
        FileExistsError: There is such a file.
    """
    if not file.exists():
        return
    try:
        with open_tensors(file, "") as opened:
            ours = METADATA in (opened.metadata() or {})
    except ValueError:
        ours = False
    if not ours:
        raise FileExistsError(f"{file} is not a skeleton file, and overwriting would destroy it. Name another file.")
