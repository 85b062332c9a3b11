"""The skeleton of a model: which rows and columns of each layer, chosen beforehand and kept in one file.

With it a conversion needs no weights: a model that is born on the meta device or already partitioned gets its indices, its
coordinates and the proof of its base (fingerprints) from the file. Format, safetensors, under canonical module names:

    <module>.rows, <module>.cols    int32 [r], [c], canonical layout [out, in]; a one-sided skeleton has no cols and no left
    <module>.left, <module>.right   float32 [c, c], [r, r]: the frame of orthonormal coordinates (see `coordinates.Frame`)
    <module>.gain                   float32 scalar: the frame of spectral and rotation coordinates
    <module>.core                   float32 [c, r]: the frame of rotation coordinates, beside left, right and gain
    metadata["pmss_skeleton"]       JSON: format_version, selection options, coordinates, base, and per module its shape,
                                    fingerprint and residual, and from format 2 on a checksum of each tensor

Only rows and cols are needed: the file of an adapter serves as well, where weights are at hand.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from lightning_pmss.layers.fingerprint import FingerprintRecord
from lightning_pmss.messages import one_line, some
from lightning_pmss.methods.given import Given, GivenLayer
from lightning_pmss.methods.pmss.coordinates import Frame, check_frame
from lightning_pmss.store import (
    Record,
    TensorRecord,
    check_index,
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
_ANY_SIZE = 2**48
_AGAIN = "Make it anew with `python -m lightning_pmss select`, or copy it again."


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


def read_skeleton(path: str | os.PathLike[str], coordinates: str | None = None, columns: str | None = None) -> Given:
    """Read and check a skeleton file, or the indices in an adapter's ``adapter_model.safetensors``.

    Args:
        path: The file.
        coordinates: Wanted; factors of others are left out. None: as they are.
        columns: Wanted, ``"selected"`` or ``"all"``; a file of the other kind is refused. None: as it is.

    Raises:
        FileNotFoundError: No such file.
        PermissionError: It must not be read.
        ValueError: Not a complete safetensors file, without pairs of rows and columns, of a format that is not known, or with
            tensors that are damaged, are no indices, or are no coordinates.
    """
    file = Path(path).expanduser()
    source = f"skeleton_file={str(path)!r}"
    if not file.exists():
        raise FileNotFoundError(f"{source} does not exist; make it with `python -m lightning_pmss select`.")
    with open_tensors(file, _AGAIN) as opened:
        keys = set(opened.keys())
        about = _read_about((opened.metadata() or {}).get(METADATA), source)
        names = sorted(key.removesuffix(".rows") for key in keys if key.endswith(".rows"))
        indices = ("rows",) if about is not None and about.options.get("columns") == "all" else ("rows", "cols")
        if about is None and not any(key.endswith(".cols") for key in keys):
            indices = ("rows",)  # an adapter of a one-sided skeleton
        if not names or any(f"{n}.{part}" not in keys for n in names for part in indices):
            what = " and ".join(f"`<module>.{part}`" for part in indices)
            raise ValueError(f"{source} does not hold {what}{' in pairs' if len(indices) > 1 else ''}. {_AGAIN}")
        if columns is not None and (columns == "all") != (indices == ("rows",)):
            has = "all" if indices == ("rows",) else "selected"
            raise ValueError(
                f"{source} is for columns={has!r}, and this run has columns={columns!r}. Make another one with"
                f" `python -m lightning_pmss select --columns {columns}`, or set columns={has!r}."
            )
        parts: tuple[str, ...] = indices
        if about is not None and about.coordinates is not None:
            parts = (*indices, *Frame._fields)
        if about is not None:
            expected = {f"{n}.{part}" for n in about.modules for part in parts}
            if lost := sorted(set(about.modules) - set(names)):
                raise ValueError(f"{source} promises {some(lost)} but does not hold them. {_AGAIN}")
            if foreign := sorted(keys - expected):
                raise ValueError(f"{source} holds {some(foreign)}, of which its header says nothing. {_AGAIN}")
        layers = {}
        for n in names:
            found = {p: get_tensor(opened, f"{n}.{p}", file, _AGAIN) for p in parts if f"{n}.{p}" in keys}
            layers[n] = _layer(found, None if about is None else about.modules[n], about, n, source)
    if about is None:
        return Given(layers, source)
    if about.coordinates is None or about.coordinates == coordinates or coordinates is None:
        return Given(layers, source, about.coordinates, about.options, complete=about.coordinates is not None)
    return Given({n: _without_factors(layer) for n, layer in layers.items()}, source, about.coordinates, about.options)


def why_no_skeleton(given: Given | None, coordinates: str) -> str | None:
    """Why a layer on the meta device cannot be converted with a skeleton, behind its name; None if it can.

    Args:
        given: The skeleton; None without one.
        coordinates: Wanted.
    """
    if given is None:
        return "is on the meta device: its rows and columns cannot be chosen; load the weights first or give skeleton_file=."
    if coordinates == "raw" or given.coordinates == coordinates:
        return None
    return (
        f"is on the meta device and coordinates={coordinates!r} need W, but {given.source} holds"
        f" {given.coordinates or 'no'} coordinates. Make it with `python -m lightning_pmss select --coordinates"
        f" {coordinates}`, or load the weights first."
    )


def _without_factors(layer: GivenLayer) -> GivenLayer:
    return replace(layer, tensors={part: t for part, t in layer.tensors.items() if part not in Frame._fields})


def _read_about(text: str | None, source: str) -> SkeletonRecord1 | None:
    """The JSON of the header; None where there is none, as in the file of an adapter."""
    if text is None:
        return None
    about = parse_json(text.encode("utf-8", "surrogatepass"), f"{source}, its header's {METADATA}", _AGAIN)
    version = about.get("format_version") if isinstance(about, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise ValueError(
            f"{source} has format {one_line(version)}, newer than this library, which reads up to {FORMAT_VERSION}; update it."
        )
    if isinstance(version, bool) or not isinstance(version, int) or version not in _RECORDS:
        raise ValueError(f"{source} has the format {shown(version)}, which does not exist. {_AGAIN}")
    return checked(_RECORDS[version], about, source, _AGAIN)


def _layer(
    found: Mapping[str, Tensor],
    entry: SkeletonLayerRecord1 | None,
    about: SkeletonRecord1 | None,
    name: str,
    source: str,
) -> GivenLayer:
    """One layer's tensors, checked."""
    out_features, in_features = entry.shape if entry is not None else (_ANY_SIZE, _ANY_SIZE)
    check_index(found["rows"], out_features, f"{name}.rows", source, _AGAIN)
    if "cols" in found:
        check_index(found["cols"], in_features, f"{name}.cols", source, _AGAIN)
    frame = None
    if about is not None and about.coordinates is not None:
        frame = Frame(*(found.get(part) for part in Frame._fields))
        factors = {f"{name}.{part}": value for part, value in found.items()}
        kinds = {value.dtype for part, value in found.items() if part in Frame._fields}
        if kinds - {torch.float32, torch.float64}:
            raise ValueError(f"{source}: the coordinates of `{name}` are not float32 or float64 numbers. {_AGAIN}")
        if broken := not_finite(factors):
            raise ValueError(f"{source}: NaN or infinite values in {some(broken)}. {_AGAIN}")
        columns = len(found["cols"]) if "cols" in found else None
        if reason := check_frame(frame, about.coordinates, columns, len(found["rows"])):
            raise ValueError(f"{source}: the coordinates of `{name}` cannot be used: {reason}. {_AGAIN}")
    if isinstance(entry, SkeletonLayerRecord):
        if odd := sorted(set(entry.tensors) ^ set(found)):
            raise ValueError(f"{source}: `{name}` differs from its header in {some(odd)}. {_AGAIN}")
        check_sums(found, entry.tensors, f"{source}, `{name}`", _AGAIN)
    return GivenLayer(
        {part: found[part].long() for part in ("rows", "cols") if part in found}
        | ({} if frame is None else frame.present()),
        None if entry is None else entry.fingerprint.model_dump(),
        None if entry is None else (out_features, in_features),
        {} if entry is None or entry.residual is None else {"residual": entry.residual},
    )
