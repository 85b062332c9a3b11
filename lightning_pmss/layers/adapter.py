"""The module that owns the tensors of one adapted layer, and turns them into those of its update."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lightning_pmss.layers.parts import fill, whole_shape

Tensors = dict[str, Tensor]


def _own(module: nn.Module, names: tuple[str, ...]) -> Tensors:
    """Attributes of these names: under FSDP1 no parameters where a checkpointed block is computed again."""
    return {name: getattr(module, name) for name in names}


class FrozenTensors(nn.Module):
    """What a method derived from W. A module of its own: sharding engines must never mix frozen and trained tensors.

    Parameters, not buffers, because engines split parameters and replicate buffers. Engines that split a module's tensors
    show them whole while it is called, so whoever needs their values hands the computation in.
    """

    def __init__(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        super().__init__()
        self.names = tuple(tensors)
        for name, tensor in tensors.items():
            # FSDP2 shards neither scalars nor transposed tensors.
            value = torch.atleast_2d(tensor).to(device).contiguous()
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))
        # On the meta device the values wait here until the parameters get memory (see `reset_parameters`).
        self.waiting: Tensors = {n: t for n, t in tensors.items() if not t.is_meta} if device.type == "meta" else {}

    def forward(self, compute: Callable[[Tensors], Tensors], trained: Tensors) -> Tensors:
        """``compute`` of the trained and the frozen tensors."""
        return compute(trained | self.tensors())

    def tensors(self) -> Tensors:
        """By name."""
        return _own(self, self.names)

    @torch.no_grad()
    def set(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the values; a collective where they are kept in parts."""
        for name, own in self.tensors().items():
            if name in tensors:
                fill(own, tensors[name].reshape(whole_shape(own)))

    def reset_parameters(self) -> None:
        """Called by engines once parameters that were made on the meta device have memory."""
        if self.waiting:
            self.set(self.waiting)
            self.waiting = {}


class Adapter(nn.Module):
    """Owns the trained tensors of a layer and, in a child, the frozen ones derived from W.

    A module of its own, so that sharding wrappers can treat it apart from the frozen weight. It stays float32 when its parent
    is cast to a lower precision (``bf16-true``): small steps of an optimizer would be rounded away in bfloat16.

    Args:
        values: Of the method: from trained and frozen tensors and the scale to the floating-point tensors of the update. What
            it returns must be new tensors, since wrappers take the trained ones' memory back when the call ends.
        start: The trained tensors at first.
        frozen: Those that the method derived from W.
        device: Of the layer.
    """

    frame: FrozenTensors | None

    def __init__(
        self,
        values: Callable[[Tensors, float], Tensors],
        start: Mapping[str, Tensor],
        frozen: Mapping[str, Tensor],
        device: torch.device,
    ) -> None:
        super().__init__()
        self.values, self.names = values, tuple(start)
        for name, value in start.items():
            self.register_parameter(name, nn.Parameter(value.to(device)))
        self.frame = FrozenTensors(frozen, device) if frozen else None
        self.waiting: Tensors = {n: t for n, t in start.items() if not t.is_meta} if device.type == "meta" else {}

    def forward(self, scale: float = 1.0) -> Tensors:
        """The floating-point tensors of the update, new ones, in the dtype of the trained ones, also under autocast."""
        trained = self.trained()
        if self.frame is None:
            return self.values(trained, scale)
        found: Tensors = self.frame(lambda tensors: self.values(tensors, scale), trained)
        return found

    def trained(self) -> Tensors:
        """The trained tensors by name."""
        return _own(self, self.names)

    def owned(self) -> list[nn.Parameter]:
        """The parameters that are trained tensors, as an optimizer gets them."""
        return list(self.parameters(recurse=False))

    def frozen(self) -> Tensors:
        """The frozen tensors by name."""
        return {} if self.frame is None else self.frame.tensors()

    def has_frozen(self) -> bool:
        """Whether there are frozen tensors."""
        return self.frame is not None

    def gradients(self) -> Tensors:
        """Of the trained tensors, as far as there are any."""
        return {name: own.grad for name, own in self.trained().items() if own.grad is not None}

    def set_frozen(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the frozen tensors; those that are trained are left as they are."""
        if self.frame is not None:
            self.frame.set(tensors)

    def reshape(self, tensors: Mapping[str, Tensor]) -> None:
        """Give trained tensors the shapes of others, whose values are copied next; not where they are kept in parts."""
        for name, own in self.trained().items():
            if own.shape != tensors[name].shape:
                empty, own.grad = own.data.new_empty(tensors[name].shape), None
                own.data = own.data.half()  # where the dtype changes, autograd forgets the old shape
                own.data = empty

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Called by engines once parameters that were made on the meta device have memory."""
        for name, own in self.trained().items():
            if name in self.waiting:
                fill(own, self.waiting[name])
        self.waiting = {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Adapter:
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype in (torch.float32, torch.float64) else tensor.to(moved.device)

        return super()._apply(keep_precision, recurse)
