"""A module that owns the parameters of several converted layers: what is the same for experts and for other matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from lightning_pmss.layers.adapted import AdaptedLinear
from lightning_pmss.layers.adapter import Adapter
from lightning_pmss.layers.foreign_writers import watch_writers
from lightning_pmss.layers.merged_layer import Mergeable
from lightning_pmss.messages import some


class AdaptedOwner(Mergeable):
    """Mixin that gives parameters of a module adapters; instances are made by `owner_class`.

    Attributes:
        base_class: The module's class before it was converted.
        disabled: Whether it runs as the base does.
    """

    base_class: ClassVar[type[nn.Module]]
    mixin: ClassVar[type[AdaptedOwner]]
    disabled: bool = False

    def layers(self) -> Mapping[str, AdaptedLinear]:
        """The converted layers, by their names behind the module's."""
        raise NotImplementedError

    @property
    def merged(self) -> bool:
        """Whether the parameters hold W'."""
        return any(layer.merged for layer in self.layers().values())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        for layer in self.layers().values():
            if layer.pristine is not None:
                layer.pristine = layer.pristine.to(layer.weight.dtype)  # it stays on the CPU, and in memory
        return self

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuilt, (self.mixin, self.base_class), self.__getstate__()  # nn.LSTM has a state of its own


def stored_tensors(
    state: Mapping[str, Tensor], name: str, start: str, core: Adapter, indices: Iterable[str]
) -> dict[str, Tensor]:
    """The tensors of the adapter of one parameter in a state dict: trained, frozen and index tensors.

    Args:
        state: The state dict. Frozen tensors that it lacks are those of ``core``.
        name: Of the parameter there.
        start: What the keys of its adapter begin with.
        core: The adapter.
        indices: Names of its index tensors.

    Raises:
        ValueError: The state dict lacks the parameter, or a trained or index tensor.
    """
    wanted = {part: f"{start}core.{part}" for part in core.trained()} | {part: f"{start}{part}" for part in indices}
    if lost := [key for key in (name, *wanted.values()) if key not in state]:
        raise ValueError(f"the state dict has tensors of the adapter of `{name}`, but lacks {some(lost)}.")
    own = {part: state[key] for part, key in wanted.items()}
    frozen = {part: state.get(f"{start}core.frame.{part}", t) for part, t in core.frozen().items()}
    return frozen | {part: t if t.is_floating_point() else t.long() for part, t in own.items()}


_CLASSES: dict[tuple[type[AdaptedOwner], type[nn.Module]], type[AdaptedOwner]] = {}


def owner_class(mixin: type[AdaptedOwner], base: type[nn.Module]) -> type[AdaptedOwner]:
    """The class of the modules that were of a class before."""
    watch_writers()
    if (mixin, base) not in _CLASSES:
        own = {"__module__": mixin.__module__, "base_class": base, "mixin": mixin}
        _CLASSES[mixin, base] = type(f"Adapted{base.__name__}", (mixin, base), own)
    return _CLASSES[mixin, base]


def _rebuilt(mixin: type[AdaptedOwner], base: type[nn.Module]) -> AdaptedOwner:
    cls = owner_class(mixin, base)
    return cls.__new__(cls)
