"""Identify the model of an evaluation by a hash of all its tensors and settings, equal in each process."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_pmss.layers.indices import index_tensors
from lightning_pmss.layers.parts import clean_name, is_fsdp1, is_sharded, whole
from lightning_pmss.layers.quantised import is_quantised, whole_weight

_CHUNK = 1 << 22  # elements cast to int64 at a time: 32 MB
_PRIME = 0x9E3779B97F4A7C15 - (1 << 64)  # odd, as a signed 64-bit number
_PASSING = {"training", "gradient_checkpointing", "call_super_init", "dump_patches", "name_or_path"}


def model_hash(model: nn.Module) -> str:
    """Hash of parameters, buffers, indices and plain settings of every module; 16 hex digits.

    The hash is exact, and independent of device, number of threads and sharding (except FSDP1). On a sharded model this is a
    collective that gathers one tensor at a time.
    """
    entries: list[Any] = []
    for name, module in model.named_modules():
        # Settings that change the output but are not tensors, such as a scale.
        plain = {k: v for k, v in vars(module).items() if not k.startswith("_") and k not in _PASSING}
        plain = {k: v for k, v in plain.items() if isinstance(v, bool | int | float | str)}
        if plain:
            entries.append([clean_name(name), sorted(plain.items())])
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers()), **index_tensors(model)}
    # Quantised weights are hashed by their dequantised values.
    coded = {f"{name}.weight": module for name, module in model.named_modules() if is_quantised(module)}
    for name, tensor in tensors.items():
        with whole_weight(coded[name]) if name in coded else whole(tensor) as value:
            entries.append([clean_name(name), str(value.dtype), list(value.shape), tensor_hash(value)])
    entries.sort(key=lambda entry: json.dumps(entry))
    if is_fsdp1(model):  # each rank has hashed its own shard
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, entries)
        entries = parts
    return digest(entries)


def digest(value: Any) -> str:
    """Hash of plain values; 16 hex digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


@torch.no_grad()
def tensor_hash(tensor: Tensor) -> int:
    """Hash of a tensor that almost surely differs for other values and for another order of the same values.

    It sums integers modulo 2^64, so it is equal on each device and in each order of summation.
    """
    bits = tensor.detach().contiguous().flatten()
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    if bits.is_complex():
        bits = torch.view_as_real(bits).flatten()
    bits = bits.view(kinds[bits.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for start in range(0, len(bits), _CHUNK):
        part = bits[start : start + _CHUNK].to(torch.int64)
        place = torch.arange(start + 1, start + 1 + len(part), device=bits.device)
        place.mul_(_PRIME)
        place ^= place >> 29  # else adding one constant to all values might cancel
        total += ((part + 1) * place).sum()
    return int(total)


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """List the differences of two identities, for a message."""
    keys = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    return ", ".join(f"{key}: {theirs.get(key)!r} there, {ours.get(key)!r} now" for key in keys)


def max_over_ranks(number: int, model: nn.Module, device: torch.device) -> int:
    """Return the maximum over ranks if the model is sharded, so that all run equally many forward passes; else the number."""
    if not (dist.is_available() and dist.is_initialized() and is_sharded(model)):
        return number
    shared = torch.tensor(number, device=device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return int(shared)
