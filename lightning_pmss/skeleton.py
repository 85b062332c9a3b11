"""The skeleton of a model: which rows and columns of each layer, chosen beforehand and kept in one file.

With it a conversion needs no weights: a model that is born on the meta device or already partitioned gets its indices, its
coordinates and the proof of its base (fingerprints) from the file. Format, safetensors, under canonical module names:

    <module>.rows, <module>.cols    int32 [r], [c], canonical layout [out, in]
    <module>.left, <module>.right   float32 [c, c], [r, r]: the frame of orthonormal coordinates (see `layers.Frame`)
    <module>.gain                   float32 scalar: the frame of spectral and rotation coordinates
    <module>.core                   float32 [c, r]: the frame of rotation coordinates, beside left, right and gain
    metadata["pmss_skeleton"]       JSON: format_version, selection options, coordinates, base, and per module its shape,
                                    fingerprint and residual

Only rows and cols are needed: the file of an adapter serves as well, where weights are at hand.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_pmss.layers import Frame
from lightning_pmss.messages import some

FORMAT_VERSION = 1
METADATA = "pmss_skeleton"


@dataclass(frozen=True)
class SkeletonLayer:
    """The skeleton of one layer.

    Attributes:
        rows: int64 [r], canonical layout.
        cols: int64 [c].
        frame: What turns V into U in the skeleton's coordinates; None: to be computed from W.
        fingerprint: Of W's selected rows and columns; None where unknown.
        shape: (out, in) of W; None where unknown.
        residual: See `selection.projection_residual`; None where unknown.
    """

    rows: Tensor
    cols: Tensor
    frame: Frame | None = None
    fingerprint: Mapping[str, str] | None = None
    shape: tuple[int, int] | None = None
    residual: float | None = None


@dataclass(frozen=True)
class Skeleton:
    """The skeletons of a model's layers by canonical module name.

    Attributes:
        layers: One entry per layer.
        coordinates: Of the stored frames; None: no frames.
        source: Where it comes from, for messages.
        options: What the selection was made with, as stored.
    """

    layers: Mapping[str, SkeletonLayer]
    coordinates: str | None = None
    source: str = "the skeleton"
    options: Mapping[str, Any] = field(default_factory=dict)


def read_skeleton(path: str | os.PathLike[str]) -> Skeleton:
    """Read a skeleton file, or the indices in an adapter's ``adapter_model.safetensors``.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not a safetensors file, or without pairs of rows and columns, or of a newer format.
    """
    file = Path(path).expanduser()
    source = f"skeleton_file={str(path)!r}"
    if not file.is_file():
        raise FileNotFoundError(f"{source} does not exist; make it with `python -m lightning_pmss select`.")
    try:
        opened = safe_open(str(file), framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{source} is not a complete safetensors file ({error}).") from error
    with opened as tensors:
        keys = set(tensors.keys())
        about: dict[str, Any] = json.loads((tensors.metadata() or {}).get(METADATA, "{}"))
        if about.get("format_version", FORMAT_VERSION) > FORMAT_VERSION:
            raise ValueError(f"{source} has format {about['format_version']}, newer than this library; update it.")
        names = sorted(key.removesuffix(".rows") for key in keys if key.endswith(".rows"))
        if not names or any(f"{n}.cols" not in keys for n in names):
            raise ValueError(f"{source} does not hold `<module>.rows` and `<module>.cols` in pairs.")
        known: dict[str, Any] = about.get("modules", {})
        if lost := sorted(set(known) - set(names)):
            raise ValueError(f"{source} promises {some(lost)} but does not hold them; make it again.")

        def tensor(key: str) -> Tensor | None:
            return tensors.get_tensor(key) if key in keys else None

        layers = {}
        for n in names:
            frame = None
            if about.get("coordinates") is not None:
                frame = Frame(*(tensor(f"{n}.{part}") for part in Frame._fields))
            entry = known.get(n, {})
            layers[n] = SkeletonLayer(
                tensors.get_tensor(f"{n}.rows").long(),
                tensors.get_tensor(f"{n}.cols").long(),
                frame,
                entry.get("fingerprint"),
                tuple(entry["shape"]) if "shape" in entry else None,
                entry.get("residual"),
            )
    return Skeleton(layers, about.get("coordinates"), source, about.get("options", {}))
