"""Open safetensors files, with one clear sentence for each refusal, and verify checksums."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_pmss.messages import one_line, some
from lightning_pmss.store.records import TensorRecord
from lightning_pmss.store.unreadable import refuse_unreadable

# Dtypes of trained tensors. Codes of quantised weights (float8, 4-bit numbers) are never ours.
_KNOWN = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
)  # fmt: skip


def open_tensors(file: Path, remedy: str) -> Any:
    """Open a safetensors file: the result of safetensors' ``safe_open``, for a ``with`` block or to keep.

    Args:
        file: Its path.
        remedy: Remedy for a damaged one, a whole sentence.

    Raises:
        FileNotFoundError: There is no such file.
        PermissionError: It must not be read.
        ValueError: It is a folder, or no complete safetensors file.
    """
    refuse_unreadable(file)
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} is not a complete safetensors file ({one_line(error)}): truncated or damaged. {remedy}"
        ) from error


def get_tensor(opened: Any, key: str, file: Path, remedy: str) -> Tensor:
    """Read one tensor of an open file, a view of the mapped file.

    Raises:
        ValueError: It cannot be read.
    """
    try:
        tensor: Tensor = opened.get_tensor(key)
        return tensor
    except (SafetensorError, OSError, RuntimeError) as error:
        raise ValueError(f"{file}: the tensor {one_line(key)} cannot be read ({one_line(error)}). {remedy}") from error


def read_tensors(file: Path, remedy: str) -> dict[str, Tensor]:
    """Read all tensors of a file as copies: a view would pin the file, which the next save replaces.

    Raises:
        FileNotFoundError, PermissionError: As `open_tensors`.
        ValueError: As `open_tensors`, or a tensor has a type that no trained tensor has.
    """
    with open_tensors(file, remedy) as opened:
        found = {}
        for key in opened.keys():  # noqa: SIM118 - not a mapping
            found[key] = get_tensor(opened, key, file, remedy)
            refuse_odd_type(found[key], key, str(file), remedy)
            found[key] = found[key].clone()
        return found


def refuse_odd_type(tensor: Tensor, key: str, where: str, remedy: str) -> None:
    """Refuse dtypes that are never trained: codes of quantised weights, with which torch cannot compute.

    Raises:
        ValueError: It has such a type.
    """
    if tensor.dtype not in _KNOWN:
        raise ValueError(
            f"{where}: {one_line(key)} has the type {dtype_name(tensor)}, which no trained tensor has. {remedy}"
        )


def numbers_in(dtype: torch.dtype) -> str:
    """The kind of numbers of a dtype: floating, complex, whole or logical; values are copied within a kind only."""
    if dtype.is_floating_point or dtype.is_complex:
        return "complex" if dtype.is_complex else "floating"
    return "logical" if dtype == torch.bool else "whole"


def misfit(stored: Tensor, dtype: torch.dtype) -> str | None:
    """Why a tensor of a file cannot be converted to this dtype; None if it can. `copy_` and `to` convert everything.

    Args:
        stored: The tensor; floating-point numbers are finite.
        dtype: Dtype of the tensor to fill.
    """
    if numbers_in(stored.dtype) != numbers_in(dtype):
        return f"is {stored.dtype}, and the model's is {dtype}: other numbers"
    if stored.dtype != dtype and not bool(stored.to(dtype).isfinite().all()):
        return f"is {stored.dtype} and too large for {dtype}, the model's"
    return None


def describe_tensors(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Dtype, shape and checksum of each tensor, as plain values, for `check_sums`."""
    return {
        name: {"dtype": dtype_name(value), "shape": list(value.shape), "sha256": sha256(value)}
        for name, value in tensors.items()
    }


def check_sums(tensors: Mapping[str, Tensor], records: Mapping[str, TensorRecord], where: str, remedy: str) -> None:
    """Refuse tensors that differ in any bit from the written ones.

    Args:
        tensors: The tensors as read.
        records: Records from the time of writing, by the same names.
        where: The file, for messages.
        remedy: Remedy, a whole sentence.

    Raises:
        ValueError: A dtype, a shape or a checksum differs.
    """
    for name, value in tensors.items():
        record = records[name]
        if (dtype_name(value), list(value.shape)) != (record.dtype, record.shape):
            raise ValueError(
                f"{where}: {one_line(name)} is {dtype_name(value)} {list(value.shape)}, and was written as {record.dtype}"
                f" {record.shape}. {remedy}"
            )
    if changed := [name for name, value in tensors.items() if sha256(value) != records[name].sha256]:
        raise ValueError(
            f"{where}: {some(changed)} changed after the file was written (its checksum differs). {remedy}"
        )


def sha256(tensor: Tensor) -> str:
    """Checksum of the tensor's bytes, row after row."""
    values = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(values.view(torch.uint8).numpy().data if values.numel() else b"").hexdigest()


def dtype_name(tensor: Tensor) -> str:
    """Name of a dtype, such as ``float32``."""
    return str(tensor.dtype).removeprefix("torch.")


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors with NaN or infinite values."""
    return [key for key, value in tensors.items() if not bool(value.isfinite().all())]


def check_index(index: Tensor, size: int, name: str, where: str, remedy: str) -> None:
    """Refuse tensors that are not distinct indices below `size`.

    Args:
        index: int32 or int64 ``[r]``.
        size: Number of rows or columns of W.
        name: The tensor's name, for messages.
        where: The file, for messages.
        remedy: Remedy, a whole sentence.

    Raises:
        ValueError: Another dtype or shape, none, one that is out of range, or one twice.
    """
    if reason := why_no_index(index, size):
        raise ValueError(f"{where}: {one_line(name)} {reason}. {remedy}")


def why_no_index(index: Tensor, size: int) -> str | None:
    """Why a tensor is no vector of distinct indices below `size`, as text behind its name; None if it is."""
    if index.dtype not in (torch.int32, torch.int64) or index.dim() != 1 or not len(index):
        return f"is {index.dtype} {list(index.shape)}, and an index vector was expected"
    if int(index.min()) < 0 or int(index.max()) >= size:
        return f"has indices outside 0..{size - 1}"
    return "has an index twice" if len(index.unique()) != len(index) else None
