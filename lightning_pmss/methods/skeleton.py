"""A file of the tensors that a method derives from W, made beforehand: a skeleton file, whatever the method.

With it a conversion needs no weights: a model that is born on the meta device or already partitioned gets its frozen and index
tensors and the proof of its base (fingerprints) from the file. Format, safetensors, under canonical module names:

    <module>.<part>             the tensors of the method: indices int32, others float32 or float64
    metadata["pmss_skeleton"]   JSON: format_version, method (PMSS's where it is missing), options, coordinates, base, and per
                                module its shape, fingerprint and residual, and from format 2 on a checksum of each tensor

`lightning_pmss.methods.pmss.skeleton` has the tensors of PMSS.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from lightning_pmss.layers.fingerprint import FingerprintRecord
from lightning_pmss.messages import one_line, some
from lightning_pmss.methods.given import Given, GivenLayer
from lightning_pmss.store import (
    Record,
    TensorRecord,
    check_sums,
    checked,
    get_tensor,
    not_finite,
    open_tensors,
    parse_json,
)
from lightning_pmss.store.records import Size, shown

FORMAT_VERSION = 2
METADATA = "pmss_skeleton"
PMSS_METHOD = "pmss"
AGAIN = "Make it anew with `python -m lightning_pmss select`, or copy it again."


class SkeletonLayerRecord1(Record):
    """What the file says of one layer, in format 1."""

    shape: Annotated[list[Size], Field(min_length=2, max_length=2)]
    fingerprint: FingerprintRecord
    residual: float | None = None


class SkeletonLayerRecord(SkeletonLayerRecord1):
    """The same in format 2: with a checksum of each of its tensors, by the last part of its name."""

    tensors: dict[str, TensorRecord]


class SkeletonRecord1(Record):
    """The JSON in the header, format 1."""

    model_config = ConfigDict(extra="ignore")

    format_version: Literal[1]
    options: dict[str, Any] = {}
    method: str = PMSS_METHOD
    coordinates: Literal["orthonormal", "rotation", "spectral", "raw"] | None = None
    base: dict[str, Any] | None = None
    versions: dict[str, str] = {}
    modules: Mapping[str, SkeletonLayerRecord1]


class SkeletonRecord(SkeletonRecord1):
    """The JSON in the header, format 2."""

    model_config = ConfigDict(extra="forbid")

    format_version: Literal[2]  # type: ignore[assignment]
    modules: Mapping[str, SkeletonLayerRecord]


_RECORDS: dict[int, type[SkeletonRecord1]] = {1: SkeletonRecord1, 2: SkeletonRecord}


def read_derived(path: str | os.PathLike[str], method: str, dimensions: Mapping[str, int]) -> Given:
    """Read and check a file of floating-point tensors that a method derived from W.

    Args:
        path: The file.
        method: Name of the method, which the file must be for.
        dimensions: Number of dimensions of each tensor of a layer, by name.

    Raises:
        FileNotFoundError: No such file.
        PermissionError: It must not be read.
        ValueError: Not a complete safetensors file, of a format that is not known, of another method, or with tensors that are
            damaged, of another kind, or not finite.
    """
    file, source = existing(path)
    with open_tensors(file, AGAIN) as opened:
        about = read_about((opened.metadata() or {}).get(METADATA), source)
        if not isinstance(about, SkeletonRecord) or about.method != method:
            raise ValueError(
                f"{source} is not for {method}. Make one with `python -m lightning_pmss select --method {method}`."
            )
        keys, expected = set(opened.keys()), {f"{name}.{part}" for name in about.modules for part in dimensions}
        if odd := sorted(keys ^ expected):
            raise ValueError(f"{source} differs from its header in {some(odd)}. {AGAIN}")
        layers = {}
        for name, entry in about.modules.items():
            tensors = {part: get_tensor(opened, f"{name}.{part}", file, AGAIN) for part in dimensions}
            for part, tensor in tensors.items():
                if tensor.dtype not in (torch.float32, torch.float64) or tensor.dim() != dimensions[part]:
                    raise ValueError(f"{source}: `{name}.{part}` is {tensor.dtype} {list(tensor.shape)}. {AGAIN}")
            refuse_infinite(tensors, name, source)
            compare_header(tensors, entry, name, source)
            layers[name] = GivenLayer(tensors, entry.fingerprint.model_dump(), (entry.shape[0], entry.shape[1]))
    return Given(layers, source, options=about.options, complete=True)


def existing(path: str | os.PathLike[str]) -> tuple[Path, str]:
    """The file, and its name for messages.

    Raises:
        FileNotFoundError: There is none.
    """
    file, source = Path(path).expanduser(), f"skeleton_file={str(path)!r}"
    if not file.exists():
        raise FileNotFoundError(f"{source} does not exist; make it with `python -m lightning_pmss select`.")
    return file, source


def refuse_infinite(found: Mapping[str, Tensor], name: str, source: str) -> None:
    """Refuse a layer's tensors that are not finite.

    Raises:
        ValueError: The message names them.
    """
    if broken := not_finite({f"{name}.{part}": value for part, value in found.items()}):
        raise ValueError(f"{source}: NaN or infinite values in {some(broken)}. {AGAIN}")


def compare_header(found: Mapping[str, Tensor], entry: SkeletonLayerRecord1 | None, name: str, source: str) -> None:
    """Refuse a layer's tensors that are not those of the file's header.

    Raises:
        ValueError: The message names them.
    """
    if isinstance(entry, SkeletonLayerRecord):
        if odd := sorted(set(entry.tensors) ^ set(found)):
            raise ValueError(f"{source}: `{name}` differs from its header in {some(odd)}. {AGAIN}")
        check_sums(found, entry.tensors, f"{source}, `{name}`", AGAIN)


def read_about(text: str | None, source: str) -> SkeletonRecord1 | None:
    """The JSON of the header; None where there is none, as in the file of an adapter."""
    if text is None:
        return None
    about = parse_json(text.encode("utf-8", "surrogatepass"), f"{source}, its header's {METADATA}", AGAIN)
    version = about.get("format_version") if isinstance(about, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise ValueError(
            f"{source} has format {one_line(version)}, newer than this library, which reads up to {FORMAT_VERSION}; update it."
        )
    if isinstance(version, bool) or not isinstance(version, int) or version not in _RECORDS:
        raise ValueError(f"{source} has the format {shown(version)}, which does not exist. {AGAIN}")
    return checked(_RECORDS[version], about, source, AGAIN)
