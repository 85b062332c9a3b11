"""Build a model on rank 0 and send the other ranks their shards, so that only rank 0 ever has it whole.

Loading on every rank before ``fully_shard`` would take as many copies in host memory as there are GPUs in the node (eight
times 26 GB for 13B parameters in bfloat16).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import fully_shard

from lightning_pmss.layers.indices import index_tensors
from lightning_pmss.layers.parts import clean_name
from lightning_pmss.messages import some


def build_on_rank_zero(build: Callable[[], nn.Module], mesh: Any, device: torch.device) -> nn.Module:
    """Build a model on rank 0, shard it over the mesh by FSDP2, and send every rank its part.

    The blocks named in the model's ``_no_split_modules`` are sharded one by one, the rest with the root. The structure (with
    meta tensors in the place of parameters) is pickled to the other ranks, with every change that ``build`` made.

    Args:
        build: Called on rank 0 only; returns the whole model, on the CPU.
        mesh: Device mesh of the data-parallel dimension.
        device: Device of this rank's shards.

    Returns:
        The sharded model; ``requires_grad`` of each parameter as ``build`` left it.

    Raises:
        RuntimeError: On the other ranks, when ``build`` failed on rank 0 (where its own error is raised).
    """
    first = torch.distributed.get_rank() == 0
    source: nn.Module | None = None
    failure: Exception | None = None
    message: list[Any] = [None]
    if first:
        try:
            source = build()
            message = [_meta_twin(source)]
        except Exception as error:  # raised again below, once the others know
            failure, message = error, [str(error)]
    torch.distributed.broadcast_object_list(message, src=0)
    if failure is not None:
        raise failure
    model = message[0]
    if not isinstance(model, nn.Module):
        raise RuntimeError(f"rank 0 could not build the model: {model}")
    names = set(getattr(model, "_no_split_modules", None) or ())
    for block in [m for m in model.modules() if type(m).__name__ in names]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    _allocate(model, device)
    whole: dict[str, Any] = source.state_dict() if source is not None else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    missing, unexpected = set_model_state_dict(model, whole, options=options)
    if lost := sorted(
        {clean_name(key) for key in (*missing, *unexpected)} - set(index_tensors(model))
    ):  # the indices came with the twin
        raise RuntimeError(f"these tensors did not reach every rank: {some(lost)}.")
    return model


def _meta_twin(model: nn.Module) -> nn.Module:
    """A copy with parameters on the meta device; ties stay ties, buffers and indices stay real."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    return copy.deepcopy(model, memo)


def _allocate(model: nn.Module, device: torch.device) -> None:
    new: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in new:
                    memory = torch.empty_like(parameter, device=device)
                    new[id(parameter)] = nn.Parameter(memory, requires_grad=parameter.requires_grad)
                module._parameters[name] = new[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
