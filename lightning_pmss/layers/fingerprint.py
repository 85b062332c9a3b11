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
from collections.abc import Mapping, Sequence
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


def fingerprint(*parts: Tensor) -> dict[str, str]:
    """Hash the parts of W that an update reads.

    Args:
        parts: Such as ``W[rows] [r, in]`` and ``W[:, cols] [out, c]``; any floating dtype (float64 is taken as float32), the
            same for all, any device.

    Returns:
        ``{"dtype": <the dtype of W>, "float32": <hash>, "bfloat16": <hash>, "float16": <hash>}``; 32 hex digits each. Empty
        where an update reads nothing of W.
    """
    if not parts:
        return {}
    return {"dtype": dtype_name(parts[0].dtype)} | {name: _hash(parts, name) for name in _DTYPES}


def same_base(record: Mapping[str, str], *parts: Tensor) -> bool:
    """Whether the parts of W are those that `record` was made from, compared in the coarser of the two dtypes.

    bfloat16 and float16 are each the coarser for some numbers. A cast from one to the other happened only on one
    side, so either hash may be the one that agrees, and either is proof enough.

    Args:
        record: What `fingerprint` returned when the adapter was saved.
        parts: Of the base at hand.
    """
    if not record or not parts:
        return not record and not parts
    now, then = dtype_name(parts[0].dtype), record["dtype"]
    if now == "float32":
        candidates = [then]
    elif then == "float32":
        candidates = [now]
    else:
        candidates = list(dict.fromkeys((now, then)))
    return any(record.get(name) == _hash(parts, name) for name in candidates)


def dtype_name(dtype: torch.dtype) -> str:
    """The name under which a dtype is compared.

    Raises:
        TypeError: A dtype that no plain weight has (a quantised base must hand in dequantised slices).
    """
    if dtype == torch.float64:
        return "float32"
    for name, known in _DTYPES.items():
        if dtype == known:
            return name
    raise TypeError(f"no fingerprint of {dtype} weights: only float64, float32, bfloat16 and float16 are known")


def _hash(parts: Sequence[Tensor], name: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        # The cast is done on the CPU, where its rounding is the same on every machine.
        values = part.detach().cpu().to(_DTYPES[name]).contiguous()
        digest.update(repr(tuple(values.shape)).encode())
        digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]
