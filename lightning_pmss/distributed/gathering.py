"""Gather one adapted layer, or all trained tensors, of a sharded model (FSDP1, FSDP2, ZeRO-3).

Everything here is a collective: call it on every rank, in the same order. Never more than one layer (FSDP1: one wrapped
block) is whole at a time. On a model that is whole already the functions only read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

from lightning_pmss.conversion.roots import below
from lightning_pmss.layers.adapted import AdaptedLinear
from lightning_pmss.layers.expert_layer import holder
from lightning_pmss.layers.experts import AdaptedExpert, called_core
from lightning_pmss.layers.indices import index_tensors
from lightning_pmss.layers.parts import clean_name, is_fsdp1, is_sharded, own_keys, whole
from lightning_pmss.methods.method import Update


@contextmanager
def gathered(model: nn.Module, layer: AdaptedLinear, *, write: bool = False) -> Iterator[None]:
    """Inside, ``layer.reads()`` and the frame's ``set`` work, also under FSDP1; do not call modules inside.

    Args:
        model: The whole model (under FSDP1 the wrapped root, or the module that it wraps).
        layer: A converted layer of it.
        write: Whether changes are to be kept.
    """
    with ExitStack() as stack:
        if is_fsdp1(model):
            place = holder(layer)
            owner = next((u for u in reversed(list(_units(model))) if any(m is place for m in u.modules())), None)
            for unit in (owner, called_core(layer)):
                if unit is not None:
                    recurse = unit is not owner
                    stack.enter_context(FSDP.summon_full_params(unit, recurse=recurse, writeback=write))
        yield


@torch.no_grad()
def whole_updates(model: nn.Module, layers: Mapping[str, AdaptedLinear]) -> Iterator[tuple[str, Update]]:
    """(name, update) of each layer, whole and detached, on every rank; the tensors of stacked experts are gathered once."""
    held: nn.Module | None = None
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        core = called_core(layer)
        if not is_sharded(core):
            yield name, layer.update()
            continue
        if core is not held:
            held, tensors = core, {}
            with gathered(model, layer):
                for key, parameter in core.named_parameters():
                    with whole(parameter) as value:
                        tensors[clean_name(key).rpartition(".")[2]] = value.clone()
        own = {n: t[layer.index] for n, t in tensors.items()} if isinstance(layer, AdaptedExpert) else tensors
        yield name, layer.method.update_of(own | layer.indices(), layer.scale)


def whole_tensors(
    model: nn.Module, *, under: Sequence[str] | None = None, keep: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """All parameters and persistent buffers of a model under clean names, whole, one after the other.

    Args:
        model: Sharded or not; under FSDP1 what its root owns is left out unless this is the root.
        under: Clean names of modules and tensors, to get only these and what lies in them.
        keep: Whether this rank wants the values, copied to the CPU; if not, it takes part and gets nothing.
    """
    flat = is_fsdp1(model)
    seen: set[str] = set()
    for prefix, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, FSDP):
            owned = [(n, p) for n, p in module.named_parameters() if _own(module, n)]
        else:
            owned = [] if flat else [(n, p) for n, p in module._parameters.items() if p is not None]
        volatile = module._non_persistent_buffers_set
        owned += [(n, b) for n, b in module._buffers.items() if b is not None and n not in volatile]  # type: ignore[misc]
        names = [clean_name(f"{prefix}.{n}".lstrip(".")) for n, _ in owned]
        wanted = [n for n in names if n not in seen and (under is None or below(n, under))]
        seen |= set(wanted)
        with ExitStack() as stack:
            if isinstance(module, FSDP) and wanted:
                stack.enter_context(FSDP.summon_full_params(module, recurse=False, writeback=False))
                owned = [(n, p) for n, p in module.named_parameters() if _own(module, n)] + owned[len(names) :]
            for name, (_, tensor) in zip(names, owned, strict=True):
                if name in wanted:
                    with whole(tensor) as value:
                        if keep:
                            yield name, value.to("cpu", copy=True)


def trained_state(model: nn.Module, keys: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of the model's state dict that a checkpoint keeps, in the form that the strategy writes.

    Args:
        model: The module that the strategy trains (under FSDP1 its root, inside a state-dict context).
        keys: Clean names to keep.

    Returns:
        FSDP1: what the units that train give, so that frozen units are never gathered; else a plain selection.
    """
    if not is_fsdp1(model):
        state = nn.Module.state_dict(model)
        return {k: v for k, v in state.items() if clean_name(k) in keys}
    found: dict[str, Any] = {}
    for prefix, unit in _trained_units(model):
        for key, value in unit.state_dict().items():
            found[f"{prefix}{clean_name(key)}"] = value
    found |= _replicated(model)
    return {k: v for k, v in found.items() if k in keys}


def load_trained_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """The inverse of `trained_state`; keys that are not given stay as they are."""
    if not is_fsdp1(model):
        nn.Module.load_state_dict(model, own_keys(model, state), strict=False)
        return
    for prefix, unit in _trained_units(model):
        part = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        if part:
            unit.load_state_dict(part, strict=False)
    with torch.no_grad():
        for name, tensor in _replicated(model).items():
            if name in state:
                tensor.copy_(state[name])


def _replicated(model: nn.Module) -> dict[str, Tensor]:
    """What every rank holds whole, under clean names."""
    return {clean_name(name): buffer for name, buffer in model.named_buffers()} | index_tensors(model)


def _units(model: nn.Module) -> Iterator[FSDP]:
    yield from (module for module in model.modules() if isinstance(module, FSDP))


def _trained_units(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(clean prefix, unit) of the FSDP1 units that own trained parameters."""
    if isinstance(root, FSDP):
        root.check_is_root()  # else the first unit that is asked for its state would take itself for the root
    for name, module in root.named_modules():
        if isinstance(module, FSDP) and any(p.requires_grad and _own(module, n) for n, p in module.named_parameters()):
            clean = clean_name(name)
            yield (f"{clean}." if clean else ""), module


def _own(unit: nn.Module, name: str) -> bool:
    """Whether the parameter of this name belongs to the unit itself and not to one nested in it."""
    parts, module = name.split("."), unit
    for part in parts[:-1]:
        module = getattr(module, part)
        if module is not unit and isinstance(module, FSDP):
            return False
    return True
