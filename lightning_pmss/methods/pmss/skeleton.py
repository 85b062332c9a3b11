"""The skeleton of a model: which rows and columns of each layer, chosen beforehand and kept in one file.

With it a conversion needs no weights: a model that is born on the meta device or already partitioned gets its indices, its
coordinates and the proof of its base (fingerprints) from the file. Format, safetensors, under canonical module names:

    <module>.rows, <module>.cols    int32 [r], [c], canonical layout [out, in]; a one-sided skeleton has no cols and no left
    <module>.left, <module>.right   float32 [c, c], [r, r]: the frame of orthonormal coordinates (see `coordinates.Frame`)
    <module>.gain                   float32 scalar: the frame of spectral and rotation coordinates
    <module>.core                   float32 [c, r]: the frame of rotation coordinates, beside left, right and gain
    metadata["pmss_skeleton"]       see `lightning_pmss.methods.skeleton`

Only rows and cols are needed: the file of an adapter serves as well, where weights are at hand.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lightning_pmss.messages import some
from lightning_pmss.methods.given import Given, GivenLayer
from lightning_pmss.methods.pmss.coordinates import Frame, check_frame
from lightning_pmss.methods.skeleton import (
    AGAIN,
    METADATA,
    PMSS_METHOD,
    SkeletonLayerRecord1,
    SkeletonRecord1,
    compare_header,
    existing,
    read_about,
    refuse_infinite,
)
from lightning_pmss.store import check_index, get_tensor, open_tensors

_ANY_SIZE = 2**48


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
    file, source = existing(path)
    with open_tensors(file, AGAIN) as opened:
        keys = set(opened.keys())
        about = read_about((opened.metadata() or {}).get(METADATA), source)
        if about is not None and about.method != PMSS_METHOD:
            raise ValueError(f"{source} is for {about.method}. Make one with `python -m lightning_pmss select`.")
        names = sorted(key.removesuffix(".rows") for key in keys if key.endswith(".rows"))
        indices = ("rows",) if about is not None and about.options.get("columns") == "all" else ("rows", "cols")
        if about is None and not any(key.endswith(".cols") for key in keys):
            indices = ("rows",)  # an adapter of a one-sided skeleton
        if not names or any(f"{n}.{part}" not in keys for n in names for part in indices):
            what = " and ".join(f"`<module>.{part}`" for part in indices)
            raise ValueError(f"{source} does not hold {what}{' in pairs' if len(indices) > 1 else ''}. {AGAIN}")
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
                raise ValueError(f"{source} promises {some(lost)} but does not hold them. {AGAIN}")
            if foreign := sorted(keys - expected):
                raise ValueError(f"{source} holds {some(foreign)}, of which its header says nothing. {AGAIN}")
        layers = {}
        for n in names:
            found = {p: get_tensor(opened, f"{n}.{p}", file, AGAIN) for p in parts if f"{n}.{p}" in keys}
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


def _layer(
    found: Mapping[str, Tensor],
    entry: SkeletonLayerRecord1 | None,
    about: SkeletonRecord1 | None,
    name: str,
    source: str,
) -> GivenLayer:
    """One layer's tensors, checked."""
    out_features, in_features = entry.shape if entry is not None else (_ANY_SIZE, _ANY_SIZE)
    check_index(found["rows"], out_features, f"{name}.rows", source, AGAIN)
    if "cols" in found:
        check_index(found["cols"], in_features, f"{name}.cols", source, AGAIN)
    frame = None
    if about is not None and about.coordinates is not None:
        frame = Frame(*(found.get(part) for part in Frame._fields))
        kinds = {value.dtype for part, value in found.items() if part in Frame._fields}
        if kinds - {torch.float32, torch.float64}:
            raise ValueError(f"{source}: the coordinates of `{name}` are not float32 or float64 numbers. {AGAIN}")
        refuse_infinite(found, name, source)
        columns = len(found["cols"]) if "cols" in found else None
        if reason := check_frame(frame, about.coordinates, columns, len(found["rows"])):
            raise ValueError(f"{source}: the coordinates of `{name}` cannot be used: {reason}. {AGAIN}")
    compare_header(found, entry, name, source)
    return GivenLayer(
        {part: found[part].long() for part in ("rows", "cols") if part in found}
        | ({} if frame is None else frame.present()),
        None if entry is None else entry.fingerprint.model_dump(),
        None if entry is None else (out_features, in_features),
        {} if entry is None or entry.residual is None else {"residual": entry.residual},
    )
