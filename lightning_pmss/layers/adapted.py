"""The converted layer, whatever its method: the base layer's own module object, with an adapter beside its weight.

The base stays a black box: its parameters keep their names, and its forward is called as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_pmss.layers.adapter import Adapter
from lightning_pmss.layers.applied import AppliedLayer
from lightning_pmss.layers.convertible import canonical_shape, layout_of, why_no_own_weight
from lightning_pmss.layers.foreign_writers import watch_writers
from lightning_pmss.layers.guard import refuse_training
from lightning_pmss.layers.indices import IndexTensors
from lightning_pmss.layers.merged_layer import MergedLayer, merge_again, merge_update
from lightning_pmss.layers.operators import operator_of, why_not_applied
from lightning_pmss.layers.parts import is_dtensor
from lightning_pmss.layers.products import core_dtype
from lightning_pmss.layers.quantised import is_quantised, whole_weight
from lightning_pmss.messages import some

if TYPE_CHECKING:
    from lightning_pmss.methods.method import Method, Update


def trained_key(name: str) -> str:
    """The state-dict key of a trained tensor, without the layer's prefix."""
    return f"core.{name}"


def frozen_key(name: str) -> str:
    """The same of a frozen tensor that was derived from W."""
    return f"core.frame.{name}"


class AdaptedLinear(IndexTensors, MergedLayer):
    """Mixin that gives a layer an adapter; instances are made by `AdaptedLinear.adopt`.

    The concrete class is a dynamic subclass of the base layer's own class, so parameters keep their names and
    ``isinstance(layer, nn.Linear)`` stays true. In canonical layout ``W [out, in]`` (GPT-2's ``Conv1D`` stores W^T; see
    `layout`)::

        W' = W + layer.update().delta(W)

    Attributes:
        method: `Method`, its mathematics and options.
        rank: After clipping.
        scale: Factor of the update.
        core: `Adapter`, owner of the trained tensors and of those derived from W.
        index_names: Names of the index tensors, which are attributes of the layer (`lightning_pmss.layers.indices`).
        fingerprint: Of what the update reads of W (`lightning_pmss.layers.fingerprint`), where it was taken while W was whole;
            None: not taken yet.
        derived_dtype: Of W when the frozen tensors were computed of it; None: they were read from a file.
        on_trust: Converted without its weight, so that nobody has compared it with the fingerprint yet.
        base_class: The layer's class before it was converted.
        disabled: Whether the layer runs as the base does (see `lightning_pmss.named.disable_adapter`).
    """

    base_class: ClassVar[type[nn.Module]]
    bias: nn.Parameter | None
    method: Method[Any]
    rank: int
    scale: float
    core: Adapter
    index_names: tuple[str, ...]  # type: ignore[misc]
    fingerprint: Mapping[str, str] | None
    derived_dtype: torch.dtype | None
    on_trust: bool
    disabled: bool = False

    @staticmethod
    def adopt(
        layer: nn.Module,
        method: Method[Any],
        rank: int,
        start: Mapping[str, Tensor],
        derived: Mapping[str, Tensor],
        scale: float,
    ) -> AdaptedLinear:
        """Turn a supported layer into an adapted one, in place: the module object and its parameters stay the same.

        Args:
            layer: A layer that owns a plain weight.
            method: See the class.
            rank: See the class.
            start: The trained tensors at first.
            derived: Frozen tensors, and index tensors of whole numbers.
            scale: See the class.
        """
        if isinstance(layer, AdaptedLinear):
            raise ValueError("the layer is converted already; a converted layer is not converted again.")
        if reason := why_no_own_weight(layer):
            raise ValueError(f"this {type(layer).__name__} cannot be converted: {reason}.")
        if reason := why_not_applied(layer):
            raise ValueError(f"this {type(layer).__name__} {reason}; it cannot be converted.")
        layer.__class__ = adapted_class(type(method), type(layer))
        assert isinstance(layer, AdaptedLinear)
        weight, dtype = layer.weight, core_dtype(layer.weight.dtype)
        indices = {name: t for name, t in derived.items() if not t.is_floating_point()}
        frozen = {name: t.to(dtype) for name, t in derived.items() if t.is_floating_point()}
        layer.index_names = tuple(indices)
        layer.set_indices(weight.device, **indices)
        own = {name: t.to(dtype) for name, t in start.items()}
        layer.core = method.make_adapter(own, frozen, weight.device, indices)
        layer.method, layer.rank, layer.scale = method, rank, float(scale)
        layer.layout, layer.quantised = layout_of(layer), is_quantised(layer)
        layer.fingerprint = layer.pristine = None
        layer.derived_dtype = None
        layer.on_trust = weight.is_meta
        method.prepare(layer)
        layer.register_load_state_dict_post_hook(merge_again)
        return layer

    # -- the update ---------------------------------------------------------------------------------------------------

    def indices(self) -> dict[str, Tensor]:
        """The index tensors by name."""
        return {name: getattr(self, name) for name in self.index_names}

    def tensors(self) -> dict[str, Tensor]:
        """Trained, frozen and index tensors by name: the live ones."""
        return self.core.trained() | self.core.frozen() | self.indices()

    def update(self) -> Update:
        """What the trained tensors mean, everything folded in; differentiable."""
        values = self.core(self.scale)
        device = next(iter(values.values())).device
        return self.method.update_class(**dict(zip(self.index_names, self.indices_on(device), strict=True)) | values)

    def numbers_of(self, update: Update, name: str = "") -> dict[str, Tensor]:
        """The trained tensors that mean an update; nothing is changed.

        Raises:
            ValueError: None do, see `Method.numbers`.
        """
        return self.method.numbers(update, self.core.frozen(), self.scale, name)

    @torch.no_grad()
    def set_numbers(self, numbers: Mapping[str, Tensor]) -> None:
        """Copy values into the trained tensors."""
        for name, own in self.core.trained().items():
            own.copy_(numbers[name])

    def set_update(self, update: Update) -> None:
        """The inverse of `update`; raises as `numbers_of`, before anything is changed."""
        self.set_numbers(self.numbers_of(update))

    def rederive(self, name: str = "") -> None:
        """Compute the frozen tensors anew after the weight or the indices were replaced; what is trained is left as it is."""
        if not self.index_names and not self.core.has_frozen():  # nothing is derived from W: do not gather it
            return
        with whole_weight(self, self.stored_weight) as stored:
            weight = self.layout.canonical(stored)
            given = {n: index.to(weight.device) for n, index in self.indices().items()}
            derived = self.method.derive(weight, self.rank, name, given)
        self.core.set_frozen(derived)
        self.derived_dtype = weight.dtype

    def ran(self) -> bool:
        """Whether the layer has seen an input; where nobody asks each input, it is taken for granted."""
        return True

    def reads(self) -> tuple[Tensor, ...]:
        """What the update reads of the pristine W, in its dtype; a collective where W is kept in parts."""
        if not self.method.update_class.bound_to_base:
            return ()
        with whole_weight(self, self.stored_weight) as stored:
            return self.reads_of(self.layout.canonical(stored), self.indices())

    def reads_of(self, weight: Tensor, indices: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """The same of another weight ``[out, in]``, or with other indices."""
        cls = self.method.update_class
        own = {name: index.to(weight.device) for name, index in indices.items()}
        return cls.reads(weight, own) if cls.bound_to_base else ()

    # -- forward ------------------------------------------------------------------------------------------------------

    def base(self, x: Tensor) -> Tensor:
        """What the layer answered before it was converted."""
        y: Tensor = self.base_class.forward(self, x)
        return y

    def forward(self, input: Tensor) -> Tensor:
        if self.disabled:
            return self.base(input)
        if not self.merged:
            if (operator := operator_of(self)) is not None:
                return operator.finished(self, input, self.method.applied(AppliedLayer(self, operator), input))
            return self.method.forward(self, input)
        if self.quantised and self.weight.is_floating_point():  # dense, behind a forward that may ask for codes
            bias = None if self.bias is None else self.bias.to(self.weight.dtype)
            output = F.linear(input.to(self.weight.dtype), self.weight, bias).to(input.dtype)
        else:
            output = self.base(input)
        return refuse_training(self, output, next(iter(self.core.trained().values())), self.method.trained)

    # -- merging, state dicts -----------------------------------------------------------------------------------------

    def of_one_device(self) -> tuple[Tensor, Update]:
        """The pristine W ``[out, in]`` and the update, detached, on the device of the update."""
        with torch.no_grad():
            update = self.update()
        device = next(iter(update.tensors().values())).device
        return self.base_weight().to(device), update

    def merged_from(self, state: Mapping[str, Tensor], prefix: str) -> Tensor:
        """W' as the base stores it, from the layer's tensors in a state dict; the layer's own stay out of it."""
        wanted = {name: trained_key(name) for name in self.core.trained()} | {n: n for n in self.index_names}
        if lost := [key for key in ("weight", *wanted.values()) if f"{prefix}{key}" not in state]:
            raise ValueError(f"the state dict has tensors of the adapter of `{prefix[:-1]}`, but lacks {some(lost)}.")
        wanted |= {name: frozen_key(name) for name in self.core.frozen()}
        own = {name: state[f"{prefix}{key}"] for name, key in wanted.items() if f"{prefix}{key}" in state}
        own = {name: t if t.is_floating_point() else t.long() for name, t in own.items()}
        with torch.no_grad():
            update = self.method.update_of(self.core.frozen() | own, self.scale)
            device = next(iter(update.tensors().values())).device
            stored = state[f"{prefix}weight"].to(device)
            weight = self.base_weight().to(device) if self.quantised else self.layout.canonical(stored)
            merged, _ = merge_update(
                weight, update, self._dense_dtype() if self.quantised else stored.dtype, prefix[:-1]
            )
        return self.as_stored(merged)

    def adapter_key(self, key: str) -> bool:
        """Index tensors, and what the `Adapter` owns."""
        return key in self.index_names or key.startswith(trained_key(""))

    def reset_parameters(self) -> None:
        """Called by engines once a layer that was made on the meta device has memory: the base's own, where it has one."""
        if (base := getattr(super(), "reset_parameters", None)) is not None:
            base()

    def index_sizes(self) -> dict[str, int]:
        """What the numbers of each index tensor stay below."""
        specs = self.method.specs(canonical_shape(self), self.rank)
        return {name: specs[name].below for name in self.index_names}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        self._refuse_merged(state_dict, prefix)
        before = {name: index.clone() for name, index in self.indices().items()}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        # The indices that were stored are used, not those selected now. The frozen tensors follow, unless they come along.
        moved = any(i.is_meta or not torch.equal(i, getattr(self, name)) for name, i in before.items())
        if f"{prefix}weight" in state_dict or moved:
            if not is_dtensor(self.weight):  # else it was taken before sharding, or is compared when training starts
                self.fingerprint = None
            if not any(f"{prefix}{frozen_key(name)}" in state_dict for name in self.core.frozen()):
                self.rederive(prefix[:-1])

    def _refuse_merged(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """A merged weight, with or without its update, would be the W to which the update is added once more."""
        loaded = state_dict.get(f"{prefix}weight")
        trained = [state_dict.get(f"{prefix}{trained_key(name)}") for name in self.core.trained()]
        if (
            self.quantised
            or not isinstance(loaded, Tensor)
            or any(t is not None and not bool(t.any()) for t in trained)
        ):
            return
        if any(is_dtensor(t) or t.is_meta or not t.is_floating_point() for t in (self.stored_weight, loaded)):
            return
        indices = {name: state_dict.get(f"{prefix}{name}", own) for name, own in self.indices().items()}
        if self.method.looks_merged(self.base_weight(), self.layout.canonical(loaded), indices):
            raise ValueError(
                f"`{prefix}weight` of the state dict is this very weight with an update merged into it, and the update would be"
                " added to it once more. Load it into a model that is not converted; into this one load the adapter"
                " (`load_adapter`), or a state dict that was taken of a converted model."
            )

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The dynamic class has no importable name: pickle and deepcopy rebuild it from the base class.
        return rebuilt, (type(self.method), self.base_class), self.__dict__

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.method.describe(self)}".lstrip(", ")


_CLASSES: dict[tuple[type[Any], ...], type[AdaptedLinear]] = {}


def adapted_class(
    method: type[Method[Any]], base: type[nn.Module], *mixins: type[AdaptedLinear]
) -> type[AdaptedLinear]:
    """The class of the layers of a method that were of a class before; mixins come first."""
    watch_writers()
    if (method, base, *mixins) not in _CLASSES:
        name = f"{method.config_class.label()}{base.__name__}"
        own = {"__module__": __name__, "base_class": base}
        _CLASSES[method, base, *mixins] = type(name, (*mixins, method.layer_class, base), own)
    return _CLASSES[method, base, *mixins]


def rebuilt(method: type[Method[Any]], base: type[nn.Module], *mixins: type[AdaptedLinear]) -> AdaptedLinear:
    """An empty layer of the class that `adapted_class` makes, for pickle."""
    cls = adapted_class(method, base, *mixins)
    return cls.__new__(cls)
