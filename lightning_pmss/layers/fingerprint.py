"""Recognise the base weights that an adapter was trained on.

A PMSS adapter stores indices, not the rows and columns themselves, so on any other base it would multiply other
numbers and nothing would look wrong. The record is a hash of the selected rows and columns in the canonical layout
``[out, in]``.

Exact, but tolerant of the dtype a checkpoint is loaded in: the slices are hashed after a cast to each of the usual
dtypes. Rounding is deterministic, so the same checkpoint seen in float32 and in bfloat16 agrees after both are cast to
bfloat16, while other weights, even by one unit in the last place of the coarser dtype, do not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from lightning_pmss.store import Record

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class FingerprintRecord(Record):
    """What `fingerprint` returns, as a file holds it."""

    dtype: Literal["float32", "bfloat16", "float16"]
    float32: _Hash
    bfloat16: _Hash
    float16: _Hash


def fingerprint(rows_of_w: Tensor, columns_of_w: Tensor) -> dict[str, str]:
    """Hash the selected slices of W.

    Args:
        rows_of_w: ``W[rows]``, shape [r, in], any floating dtype (float64 counts as float32), any device.
        columns_of_w: ``W[:, cols]``, shape [out, c], same dtype.

    Returns:
        ``{"dtype": <the dtype of W>, "float32": <hash>, "bfloat16": <hash>, "float16": <hash>}``; 32 hex digits each.
    """
    record = {"dtype": dtype_name(rows_of_w.dtype)}
    for name in _DTYPES:
        record[name] = _hash(rows_of_w, columns_of_w, name)
    return record


def same_base(record: Mapping[str, str], rows_of_w: Tensor, columns_of_w: Tensor) -> bool:
    """Whether the slices are those that `record` was made from, compared in the coarser of the two dtypes.

    bfloat16 and float16 are each the coarser for some numbers. A cast from one to the other happened only on one
    side, so either hash may be the one that agrees, and either is proof enough.

    Args:
        record: what `fingerprint` returned when the adapter was saved.
        rows_of_w: shape [r, in], of the base at hand.
        columns_of_w: shape [out, c], of the base at hand.
    """
    now, then = dtype_name(rows_of_w.dtype), record["dtype"]
    if now == "float32":
        candidates = [then]
    elif then == "float32":
        candidates = [now]
    else:
        candidates = list(dict.fromkeys((now, then)))
    return any(record.get(name) == _hash(rows_of_w, columns_of_w, name) for name in candidates)


def dtype_name(dtype: torch.dtype) -> str:
    """The name under which a dtype is compared.

    Raises:
        TypeError: a dtype that no plain weight has (a quantised base must hand in dequantised slices).
    """
    if dtype == torch.float64:
        return "float32"
    for name, known in _DTYPES.items():
        if dtype == known:
            return name
    raise TypeError(f"no fingerprint of {dtype} weights: only float64, float32, bfloat16 and float16 are known")


def _hash(rows_of_w: Tensor, columns_of_w: Tensor, name: str) -> str:
    digest = hashlib.sha256()
    for part in (rows_of_w, columns_of_w):
        # The cast is done on the CPU, where its rounding is the same on every machine.
        values = part.detach().cpu().to(_DTYPES[name]).contiguous()
        digest.update(repr(tuple(values.shape)).encode())
        digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]
