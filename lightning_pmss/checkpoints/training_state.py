"""Check the training state in a checkpoint: progress of the loops, states of optimizers and schedulers.

Lightning loads these after the weights without checks: it accepts a list that is too short, and trains with moments that are
NaN.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_pmss.checkpoints.reading import DAMAGED
from lightning_pmss.messages import one_line, reason
from lightning_pmss.store.records import shown

# Moments of torch's optimizers that have the shape of their parameter; `load_state_dict` does not compare.
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")


def check_progress(content: Mapping[str, Any], name: str, own: Mapping[str, Any], where: str) -> None:
    """Refuse loop progress that a run cannot resume from.

    Args:
        content: The checkpoint.
        name: Name of the loop in the checkpoint, such as ``fit_loop``.
        own: State dict of that loop now.
        where: The checkpoint, for messages.

    Raises:
        ValueError: The progress is missing, or a part of it has another type than Lightning writes.
    """
    loops = content.get("loops")
    if not isinstance(loops, Mapping) or name not in loops:
        raise ValueError(f"{where} is damaged: it has no `loops.{name}`, the progress of the run. {DAMAGED}")
    if (wrong := _differs(loops[name], own)) is not None:
        raise ValueError(f"{where} is damaged: `loops.{name}{wrong}` is not what Lightning writes. {DAMAGED}")


def _differs(found: Any, own: Any) -> str | None:
    """First place, with a leading dot, where types differ; missing and further keys of other versions are accepted."""
    if isinstance(own, Mapping):
        if not isinstance(found, Mapping):
            return ""
        parts = ((key, _differs(found[key], value)) for key, value in own.items() if key in found)
        return next((f".{key}{wrong}" for key, wrong in parts if wrong is not None), None)
    if isinstance(own, int):
        fits = type(found) is type(own) and found >= 0
        return None if fits else ""
    return None


def check_training_state(content: Mapping[str, Any], where: str) -> None:
    """Refuse a checkpoint whose states of optimizers or schedulers are missing or not finite.

    Raises:
        ValueError: A state is missing, is no mapping, or has NaN or infinite values.
    """
    for name in ("optimizer_states", "lr_schedulers"):
        if name not in content:
            raise ValueError(
                f"{where} has no `{name}`, so a run cannot resume from it (ModelCheckpoint(save_weights_only=True) leaves"
                " it out). To start anew from its weights, use load_from_checkpoint and fit without ckpt_path."
            )
        for number, state in enumerate(content[name]):
            if not isinstance(state, Mapping):
                raise ValueError(f"{where} is damaged: `{name}.{number}` is no state. {DAMAGED}")
            for place, value in _leaves(state, f"{name}.{number}"):
                if isinstance(value, float | Tensor) and not _is_finite(value, place):
                    raise ValueError(f"{where}: NaN or infinite values in `{one_line(place)}`. {DAMAGED}")


def _is_finite(value: float | Tensor, place: str) -> bool:
    tensor = torch.as_tensor(value)
    if tensor.is_meta or tensor.layout != torch.strided or tensor.dtype.itemsize < 2:  # codes of 8-bit optimizers
        return True
    if isinstance(value, float) and not place.endswith("lr"):  # a limit may be infinite
        return value == value
    return bool(tensor.isfinite().all())


def _leaves(tree: Any, place: str) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, f"{place}.{key}")
    elif isinstance(tree, list | tuple):
        for number, value in enumerate(tree):
            yield from _leaves(value, f"{place}.{number}")
    else:
        yield place, tree


@contextmanager
def loading_optimizers(optimizers: Sequence[Optimizer], content: Mapping[str, Any], where: str) -> Iterator[None]:
    """Refuse states of other optimizers before and while the ``with`` block loads them.

    Args:
        optimizers: The optimizers that load the states.
        content: The checkpoint.
        where: The checkpoint, for messages.

    Raises:
        ValueError: The number of optimizers, parameter groups or parameters differs, or a state does not fit.
    """
    states = content["optimizer_states"]
    remedy = "Resume with the optimizers of the run that made it, or use an earlier checkpoint."
    if len(states) != len(optimizers):
        raise ValueError(
            f"{where} has the states of {len(states)} optimizers, this run has {len(optimizers)}. {remedy}"
        )
    try:
        for optimizer, state in zip(optimizers, states, strict=True):
            _check_state(optimizer, state)
        yield
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, IndexError) as error:
        raise ValueError(
            f"{where}: the state of its optimizers does not fit this run's ({reason(error)}). {remedy}"
        ) from error


def _check_state(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Raise ValueError for states that torch's ``load_state_dict`` accepts, although they do not fit the optimizer."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    needed = ("step", "exp_avg", "exp_avg_sq") if isinstance(optimizer, torch.optim.Adam) else ()  # AdamW is one
    for number, parameter in zip(numbers, parameters, strict=False):
        own = state["state"].get(number, {})
        if own and (missing := [name for name in needed if not isinstance(own.get(name), float | Tensor)]):
            raise ValueError(f"parameter {number} has no {missing[0]}")
        for name, value in own.items():
            if name in _MOMENTS and isinstance(value, Tensor) and value.shape != parameter.shape:
                raise ValueError(f"{name} of parameter {number} is {list(value.shape)}, not {list(parameter.shape)}")
    for group in state["param_groups"]:
        for name, usual in getattr(optimizer, "defaults", {}).items():
            if not _is_like(group.get(name), usual):
                raise ValueError(f"{name}={shown(group.get(name))} of a parameter group")
        _check_options(optimizer, group)


def _check_options(optimizer: Optimizer, group: Mapping[str, Any]) -> None:
    """Validate the options by making one of torch's optimizers; ``load_state_dict`` does not check them."""
    kind: Any = type(optimizer)
    if not kind.__module__.startswith("torch.optim."):
        return
    known = inspect.signature(kind).parameters
    numbers = {
        n: group[n] for n, usual in optimizer.defaults.items() if n in known and isinstance(usual, float | tuple)
    }
    kind([torch.zeros(2, 2)], **numbers)


def _is_like(value: Any, usual: Any) -> bool:
    """Whether an option has a type like its default; later versions of torch added switches, which may be missing."""
    if usual is None or isinstance(usual, bool):
        return value is None or isinstance(value, bool | int | float | Tensor)
    if isinstance(usual, int | float | Tensor):
        return isinstance(value, int | float | Tensor) and not isinstance(value, bool)
    if isinstance(usual, tuple | list):
        return isinstance(value, tuple | list) and len(value) == len(usual) and all(map(_is_like, value, usual))
    return True
