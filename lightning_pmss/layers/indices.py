"""Index tensors of a layer: stored and moved with it, and out of reach of whatever computes on parameters and buffers.

Averages of models, DDP's broadcast of buffers and casts walk ``parameters()`` and ``buffers()``. A mean of two row numbers is
another row. So these tensors are plain attributes, which no such walk finds; the state dict has them all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lightning_pmss.layers.parts import clean_name
from lightning_pmss.store import why_no_index


class IndexTensors(nn.Module):
    """Mixin for layers that own index tensors: int64 ``[k]`` or ``[experts, k]``, distinct, never trained, averaged or cast.

    The state dict has them under the attributes' names, of any integer dtype when it is loaded. They follow the module to
    another device. On the meta device their values are kept and come back with ``to_empty``.
    """

    index_names: ClassVar[tuple[str, ...]] = ()
    waiting: dict[str, Tensor]

    def set_indices(self, device: torch.device, **tensors: Tensor) -> None:
        """Take the values as they are; on the meta device they wait for memory."""
        self.waiting = {n: t.cpu() for n, t in tensors.items()} if device.type == "meta" else {}
        for name, tensor in tensors.items():
            setattr(self, name, tensor.to(device, torch.int64))

    def index_sizes(self) -> dict[str, int]:
        """What each index tensor counts up to, exclusively; for the check of what is loaded."""
        raise NotImplementedError

    def indices_on(self, device: torch.device) -> tuple[Tensor, ...]:
        """The index tensors on the device of the input: some engines move only parameters and buffers there."""
        own = tuple(getattr(self, name) for name in self.index_names)
        if not own or own[0].device == device:
            return own
        moved = tuple(tensor.to(device) for tensor in own)
        if device.type != "meta":
            for name, tensor in zip(self.index_names, moved, strict=True):
                setattr(self, name, tensor)
        return moved

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        for name in self.index_names:
            old: Tensor = getattr(self, name)
            new = fn(old)  # of which only the device counts: it may be cast, or empty
            if new.is_meta and not old.is_meta:
                self.waiting[name] = old.cpu()
                setattr(self, name, new.to(torch.int64))
            elif old.is_meta and not new.is_meta:
                setattr(self, name, self.waiting.pop(name).to(new.device, torch.int64))
            else:
                setattr(self, name, old.to(new.device))
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.index_names:
            destination[f"{prefix}{name}"] = getattr(self, name)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        sizes = self.index_sizes()
        for name in self.index_names:
            key = f"{prefix}{name}"
            if key in unexpected_keys:
                unexpected_keys.remove(key)
            if key not in state_dict:
                if strict:
                    missing_keys.append(key)
            elif reason := why_no_indices(state_dict[key], getattr(self, name).shape, sizes[name]):
                error_msgs.append(f"{key} {reason}.")
            else:
                self._take(name, state_dict[key], bool(local_metadata.get("assign_to_params_buffers")))

    def _take(self, name: str, value: Tensor, assign: bool) -> None:
        own: Tensor = getattr(self, name)
        if value.is_meta:
            return
        if own.is_meta and not assign:
            self.waiting[name] = value.cpu().to(torch.int64)
        elif assign:
            setattr(self, name, value.to(torch.int64))
        else:
            own.copy_(value)


def why_no_indices(value: Any, shape: torch.Size, size: int) -> str | None:
    """Why a value of a state dict cannot be indices of this shape, to be put behind its name; None if it can.

    Args:
        value: As found.
        shape: ``[k]``, or ``[experts, k]`` of indices that are distinct within a row.
        size: What they stay below.
    """
    if not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        kind = str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else type(value).__name__
        return f"is {kind}, and whole numbers were expected"
    if value.shape != shape:
        return f"has the shape {list(value.shape)}, and {list(shape)} was expected"
    if value.is_meta:
        return None
    return next(filter(None, (why_no_index(row, size) for row in value.long().reshape(-1, shape[-1]))), None)


def index_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The index tensors of all layers, under the clean names of their keys in ``model.state_dict()``."""
    return {
        clean_name(f"{name}.{part}" if name else part): getattr(layer, part)
        for name, layer in model.named_modules(remove_duplicate=False)
        if isinstance(layer, IndexTensors)
        for part in layer.index_names
    }
