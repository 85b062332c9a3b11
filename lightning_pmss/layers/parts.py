"""Read and write sharded tensors (DTensor, ZeRO-3), one at a time.

FSDP2 keeps a parameter as a ``DTensor``, ZeRO-3 as an empty tensor with a partition beside it. Both can be gathered on their
own, so that no more than one weight is ever whole. FSDP1 keeps one flat tensor per wrapped module and cannot: see `gathering`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP


@contextmanager
def whole(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the whole tensor, detached, for reading; a collective if the tensor is sharded: enter it on every rank."""
    if is_zero_partitioned(tensor):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            yield tensor.detach()
    elif is_dtensor(tensor):
        yield tensor.detach().full_tensor()  # type: ignore[attr-defined]
    else:
        yield tensor.detach()


@torch.no_grad()
def fill(tensor: Tensor, value: Tensor) -> None:
    """Copy a whole value, equal on all ranks, into a tensor that may be kept in parts; then it is a collective."""
    if is_zero_partitioned(tensor):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor], modifier_rank=0):
            tensor.copy_(value)
        return
    if is_dtensor(tensor):
        from torch.distributed.tensor import distribute_tensor

        place: Any = tensor
        value = distribute_tensor(value.to(place.device, place.dtype), place.device_mesh, place.placements)
    tensor.copy_(value)


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, detached: the partition of ZeRO-3, the shard of FSDP2, else the tensor."""
    part: Tensor = getattr(tensor, "ds_tensor", tensor)
    return getattr(part, "_local_tensor", part).detach()


def whole_shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape of the whole tensor (of what FSDP1 flattened: of the part)."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def whole_size(tensor: Tensor) -> int:
    """Number of elements of the whole tensor."""
    return math.prod(whole_shape(tensor))


def is_dtensor(tensor: Tensor) -> bool:
    """Whether this is a ``DTensor``, asked by name so that torch.distributed need not be there."""
    return any(c.__name__ == "DTensor" for c in type(tensor).__mro__)


def is_zero_partitioned(tensor: Tensor) -> bool:
    """Whether ZeRO-3 manages this parameter."""
    return hasattr(tensor, "ds_id")


def is_sharded(model: nn.Module) -> bool:
    """Whether parts of the model live on other ranks."""
    return is_fsdp1(model) or any(is_dtensor(p) or is_zero_partitioned(p) for p in model.parameters())


def is_fsdp1(model: nn.Module) -> bool:
    """Whether FSDP1 has wrapped the model or modules in it."""
    return any(isinstance(module, FSDP) for module in model.modules())


@contextmanager
def outside_zero_init() -> Iterator[None]:
    """Suspend ``deepspeed.zero.Init``: inside it every new tensor gets the engine's dtype and every new module is split."""
    name = "deepspeed.runtime.zero.partition_parameters"
    module: Any = sys.modules.get(name)  # never imported here: without DeepSpeed there is nothing to suspend
    if module is None:
        yield
        return
    module.shutdown_init_context()
    try:
        yield
    finally:
        module.restore_init_context()


_WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")


def clean_name(name: str) -> str:
    """A module, parameter or state-dict name without what FSDP1, activation checkpointing and ``torch.compile`` put into it.

    Every name is compared, stored and shown in this form: a checkpoint of a compiled model is one of the plain model.
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def clean_state(module: nn.Module) -> dict[str, Any]:
    """``module.state_dict()`` under clean names."""
    return {clean_name(key): value for key, value in module.state_dict().items()}


def own_keys(module: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict under the keys that ``module.load_state_dict`` knows; what the module does not have stays as it is."""
    known = {clean_name(key): key for key in nn.Module.state_dict(module)}
    return {known.get(clean_name(key), key): value for key, value in state.items()}
