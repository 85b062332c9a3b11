"""Support ``load_from_checkpoint`` of any LightningModule for checkpoints without the frozen weights.

Lightning makes the module, calls ``configure_model`` and ``on_load_checkpoint``, and loads the state dict; the layers must be
converted in between. A checkpoint may name the function that makes the module (``_instantiator``, which LightningCLI uses).
The functions here make it as Lightning does, and let ``on_load_checkpoint`` convert it.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import lightning as L
from lightning.pytorch.core import saving
from torch import Tensor

from lightning_pmss.checkpoints.checks import check, check_state
from lightning_pmss.checkpoints.contents import trained_shapes
from lightning_pmss.checkpoints.names import described, from_keys
from lightning_pmss.checkpoints.reading import check_content
from lightning_pmss.checkpoints.record import (
    METADATA,
    CheckpointRecord,
    CheckpointRecord1,
    check_layer,
    options_of,
    read_record,
)
from lightning_pmss.conversion.convert import conversion_of, convert
from lightning_pmss.conversion.roots import canonical_modules, choose_root
from lightning_pmss.conversion.targets import Names
from lightning_pmss.layers.parts import clean_name, clean_state, own_keys
from lightning_pmss.messages import some
from lightning_pmss.methods import method_of
from lightning_pmss.methods.config import AdapterConfig
from lightning_pmss.methods.given import Given, GivenLayer

_ENTRY = "_instantiator"
_SOURCE = "the checkpoint"
_ANY_SIZE = 2**48


def announce(checkpoint: dict[str, Any], module: L.LightningModule) -> None:
    """Name `instantiate` in a checkpoint as the function that makes the module, in a form that LightningCLI accepts.

    Args:
        checkpoint: The checkpoint to write; changed in place.
        module: The LightningModule of the checkpoint.
    """
    key = module.CHECKPOINT_HYPER_PARAMS_KEY
    saved = dict(checkpoint.get(key) or {})
    name = checkpoint.get(module.CHECKPOINT_HYPER_PARAMS_NAME)
    if name in inspect.signature(type(module).__init__).parameters:
        return  # its hyper-parameters are one argument, which would contain this entry, too
    by_cli = str(saved.get(_ENTRY, "")).endswith("cli.instantiate_module")
    saved[_ENTRY] = f"{__name__}.{(instantiate_by_cli if by_cli else instantiate).__name__}"
    checkpoint[key] = saved


def instantiate(cls: type, arguments: dict[str, Any]) -> Any:
    """Make a module whose ``on_load_checkpoint`` converts it."""
    return _converting(cls(**arguments))


def instantiate_by_cli(cls: type, arguments: dict[str, Any]) -> Any:
    """Do the same as `instantiate` for a module whose hyper-parameters LightningCLI saved."""
    from lightning.pytorch.cli import instantiate_module  # only such modules need jsonargparse

    return _converting(instantiate_module(cls, arguments))


def restore(module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
    """Convert a module like the one in a checkpoint, with the same rows and columns, so that its state dict can be loaded.

    The module's present frozen weights are kept. They are added to the checkpoint's state dict, so that strict loading finds
    every key.

    Args:
        module: The module with its layers, converted or not.
        checkpoint: Checkpoint as Lightning reads it; its ``state_dict`` is completed in place.

    Raises:
        ValueError: The checkpoint is damaged, has no adapter, or belongs to another base or module.
    """
    check_content(checkpoint, _SOURCE)
    record = read_record(checkpoint.get(METADATA), _SOURCE)
    state = {clean_name(key): value for key, value in checkpoint["state_dict"].items()}
    if conversion_of(module) is None:
        options = options_of(record, _SOURCE)
        given, names = _found(module, record, options, state)
        convert(module, options, given=given, names=names)
    trained = trained_shapes(module)
    own = clean_state(module)
    check(module, trained, set(own), {key: tuple(value.shape) for key, value in state.items()}, record, _SOURCE)
    check_state(module, record, state, _SOURCE)
    # Stored tensors come first: Lightning moves the module to the device of the first one.
    checkpoint["state_dict"] = own_keys(module, state | {key: value for key, value in own.items() if key not in state})


def _found(
    module: L.LightningModule,
    record: CheckpointRecord1 | CheckpointRecord,
    options: AdapterConfig,
    state: dict[str, Tensor],
) -> tuple[Given, Names]:
    """Rows and columns from the state dict, and names to convert; `check_state` compares the base later."""
    if isinstance(record, CheckpointRecord):
        found = described(record, options, state, _SOURCE)
    else:
        found = from_keys(record.prints, options, state, _SOURCE, "")
    layers, ranks, method = {}, {}, method_of(options)
    for name, layer in found.layers.items():
        shape = layer.shape or (_ANY_SIZE, _ANY_SIZE)  # unknown in format 1; `check_state` uses the module's
        stored = check_layer(state, shape, method, layer.key, _SOURCE, layer.rank)
        layers[name] = GivenLayer({part: index.cpu() for part, index in stored.indices.items()})
        ranks[name] = stored.rank
    # Keys are full names, the others are relative to the root; if all are equal, `choose_root` finds the same root.
    roots = {layer.key.removesuffix(name).removesuffix(".") for name, layer in found.layers.items()} - {""}
    root = next(iter(roots)) if roots else choose_root(module, options.root)
    here = root in {clean_name(name) for name, _ in module.named_modules()}
    known = set(canonical_modules(module, root, layers.keys())) if here else set()
    if absent := sorted((set(layers) | set(found.full_modules)) - known):
        raise ValueError(
            f"{_SOURCE} has {some(absent)}, which this {type(module).__name__} does not have: it belongs to another module."
        )
    return Given(layers, source=_SOURCE), Names(root, list(layers), found.full_modules, ranks)


def _converting(module: Any) -> Any:
    if not isinstance(module, L.LightningModule):
        return module
    original = module.on_load_checkpoint

    @functools.wraps(original)
    def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
        del module.on_load_checkpoint  # once: it must not survive in a pickle or a copy
        restore(module, checkpoint)
        original(checkpoint)

    module.on_load_checkpoint = on_load_checkpoint  # type: ignore[method-assign]
    return module


# Lightning calls only functions on this list that a checkpoint names; older versions have no list.
_allowed: set[str] = getattr(saving, "_ALLOWED_INSTANTIATORS", set())
_allowed.update(f"{__name__}.{function.__name__}" for function in (instantiate, instantiate_by_cli))
