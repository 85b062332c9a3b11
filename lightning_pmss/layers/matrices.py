"""Matrices in parameters of other modules with adapters: the module that owns them, its forward pass, and each one's layer.

Nothing is known of what the module does with a parameter. So W' is formed at the beginning of its forward pass, in W's dtype,
stands in W's place until that ends, and gradients pass through it to the trained tensors. W itself stays as it is. Merged or
disabled, the module is computed as before its conversion.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_pmss.layers.adapted import AdaptedLinear, adapted_class, rebuilt
from lightning_pmss.layers.guard import refuse_training
from lightning_pmss.layers.indices import IndexTensors
from lightning_pmss.layers.layout import Layout
from lightning_pmss.layers.matrix_layer import KEPT, MatrixLinear
from lightning_pmss.layers.merged_layer import LayerDrift, merge_update
from lightning_pmss.layers.owners import AdaptedOwner, owner_class, stored_tensors
from lightning_pmss.layers.products import core_dtype, without_autocast

if TYPE_CHECKING:
    from lightning_pmss.methods.method import Method

MATRIX_SUFFIX = "_matrix"
_FLAT = "_flat_weights"  # in which nn.LSTM and its relatives have their parameters a second time


class MatrixAdapter(IndexTensors):
    """Owns the tensors of one parameter's adapter; a child of the module that owns the parameter.

    Attributes:
        method, rank, core: See `AdaptedLinear`.
        index_names: Of the index tensors.
    """

    index_names: tuple[str, ...]  # type: ignore[misc]

    def __init__(
        self,
        method: Method[Any],
        rank: int,
        shape: tuple[int, int],
        start: Mapping[str, Tensor],
        derived: Mapping[str, Tensor],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.method, self.rank, self.shape = method, rank, shape
        indices = {name: t for name, t in derived.items() if not t.is_floating_point()}
        frozen = {name: t.to(dtype) for name, t in derived.items() if t.is_floating_point()}
        self.index_names = tuple(indices)
        self.set_indices(device, **indices)
        self.core = method.make_adapter({name: t.to(dtype) for name, t in start.items()}, frozen, device, indices)

    def index_sizes(self) -> dict[str, int]:
        specs = self.method.specs(self.shape, self.rank)
        return {name: specs[name].below for name in self.index_names}

    def extra_repr(self) -> str:
        return f"{self.method.config.method}(rank={self.rank})"


class AdaptedMatrix(AdaptedLinear):
    """Mixin: the converted layer of one parameter. Its tensors are those of a `MatrixAdapter`."""

    owner: Any
    key: str

    @property
    def adapter(self) -> MatrixAdapter:
        """The owner of the tensors."""
        found: MatrixAdapter = self.owner._modules[f"{self.key}{MATRIX_SUFFIX}"]
        return found

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("index_names", ()):
            return getattr(self.adapter, name)
        return super().__getattr__(name)

    def indices_on(self, device: torch.device) -> tuple[Tensor, ...]:
        """Those of the adapter, which follow the model to its device."""
        return self.adapter.indices_on(device)

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> Any:
        """On the owner: nobody calls this layer."""
        return self.owner.register_forward_hook(*args, **kwargs)

    def changed(self) -> Tensor:
        """W' as the owner stores W, differentiable in the trained tensors, with one rounding."""
        weight: Tensor = self.weight
        with without_autocast(weight):
            wide = core_dtype(weight.dtype)
            change = self.update().delta(weight.detach(), dtype=wide)
            return (weight.detach().to(wide) + change).to(weight.dtype)

    @torch.no_grad()
    def _show(self, new: Tensor) -> None:
        """Let the parameter be W'."""
        if self.pristine is None:
            self._keep(self.weight.detach().to("cpu", copy=True))
        if self.weight.dtype == new.dtype:
            self.weight.copy_(new)
        else:  # a state dict of another dtype was assigned
            self.owner._parameters[self.key] = nn.Parameter(new.to(self.weight.device), requires_grad=False)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return rebuilt, (type(self.method), self.base_class, AdaptedMatrix), self.__dict__


class AdaptedMatrices(AdaptedOwner):
    """Mixin that gives parameters of a module adapters; instances are made by `adopt_matrix`."""

    inside: bool = False

    def layers(self) -> dict[str, AdaptedMatrix]:
        """The converted layers by name of the parameter."""
        found: dict[str, AdaptedMatrix] = self.__dict__[KEPT]
        return found

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base's forward with W' in the parameters' place."""
        if self.disabled or self.inside:
            return self.base_class.forward(self, *args, **kwargs)
        if self.merged:
            output = self.base_class.forward(self, *args, **kwargs)
            layer = next(iter(self.layers().values()))
            trained, kind = next(iter(layer.core.trained().values())), layer.method.trained

            def refusing(value: Any) -> Any:
                floats = isinstance(value, Tensor) and value.is_floating_point()
                return refuse_training(self, value, trained, kind) if floats else value

            return tree_map(refusing, output)
        with self._changed():
            return self.base_class.forward(self, *args, **kwargs)

    @contextmanager
    def _changed(self) -> Iterator[None]:
        own, flat = dict(self._parameters), self.__dict__.get(_FLAT)
        new = {key: layer.changed() for key, layer in self.layers().items()}
        self.inside = True
        self._parameters.update(new)  # type: ignore[arg-type]
        if flat is not None:
            replaced = {id(own[key]): value for key, value in new.items()}
            self.__dict__[_FLAT] = [replaced.get(id(value), value) for value in flat]
        try:
            yield
        finally:
            self.inside = False
            self._parameters.update({key: own[key] for key in new})
            if flat is not None:
                self.__dict__[_FLAT] = flat

    # -- merging, state dicts -----------------------------------------------------------------------------------------

    def adapter_key(self, key: str) -> bool:
        """What the adapters own."""
        return any(key.startswith(f"{name}{MATRIX_SUFFIX}.") for name in self.layers())

    @torch.no_grad()
    def plain_weights(self, name: str) -> tuple[dict[str, Tensor], dict[int, LayerDrift]]:
        """See `Mergeable`."""
        found = {key: layer.merged_weight(f"{name}.{key}".lstrip(".")) for key, layer in self.layers().items()}
        return {key: value for key, (value, _) in found.items()}, {
            id(self.layers()[key]): drift for key, (_, drift) in found.items()
        }

    @torch.no_grad()
    def plain_from(self, state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """See `Mergeable`."""
        found = {}
        for key, layer in self.layers().items():
            start = f"{prefix}{key}{MATRIX_SUFFIX}."
            tensors = stored_tensors(state, f"{prefix}{key}", start, layer.core, layer.index_names)
            update, weight = layer.method.update_of(tensors, layer.scale), state[f"{prefix}{key}"]
            found[key], _ = merge_update(weight, update.to(weight.device), weight.dtype, f"{prefix}{key}")
        return found

    @contextmanager
    def _pristine_in_place(self) -> Iterator[None]:
        """Inside, the parameters are the pristine ones; what is put in their place becomes pristine."""
        merged = {key: layer for key, layer in self.layers().items() if layer.pristine is not None}
        shown = {key: self._parameters[key] for key in merged}
        for key, layer in merged.items():
            self._parameters[key] = nn.Parameter(layer.stored_weight, requires_grad=False)
        try:
            yield
        finally:
            for layer in merged.values():
                layer._keep(layer.weight.detach())
            self._parameters.update(shown)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        before = {
            key: {name: index.clone() for name, index in layer.indices().items()}
            for key, layer in self.layers().items()
        }
        loaded = [key for key in self.layers() if f"{prefix}{key}" in state_dict]
        framed = [
            k for k in self.layers() if any(f"{prefix}{k}{MATRIX_SUFFIX}.core.frame." in name for name in state_dict)
        ]
        # For `_follow`: the adapters are loaded after this.
        self.__dict__["loaded_as"] = prefix[:-1], loaded, framed, before


def adopt_matrix(
    layer: MatrixLinear,
    method: Method[Any],
    rank: int,
    start: Mapping[str, Tensor],
    derived: Mapping[str, Tensor],
    scale: float,
) -> None:
    """Give a parameter an adapter, in place: its module, the parameter and the layer stay the same objects.

    Args:
        layer: Of the parameter.
        method, rank, start, derived, scale: See `AdaptedLinear.adopt`.
    """
    owner, key, weight = layer.owner, layer.key, layer.weight
    if not isinstance(owner, AdaptedMatrices):
        owner.__class__ = owner_class(AdaptedMatrices, type(owner))
        owner.__dict__[KEPT] = {}
        owner.register_load_state_dict_post_hook(_follow)
    shape = layer.out_features, layer.in_features
    adapter = MatrixAdapter(method, rank, shape, start, derived, weight.device, core_dtype(weight.dtype))
    adapter.train(owner.training)
    owner.add_module(f"{key}{MATRIX_SUFFIX}", adapter)
    made: nn.Module = layer
    base: Any = type(layer)
    made.__class__ = adapted_class(type(method), base, AdaptedMatrix)
    assert isinstance(made, AdaptedMatrix)
    made.index_names, made.core = adapter.index_names, adapter.core
    made.method, made.rank, made.scale = method, rank, float(scale)
    made.layout, made.quantised = Layout.PARAMETER, False
    made.fingerprint = made.pristine = made.derived_dtype = None
    made.on_trust = weight.is_meta
    method.prepare(made)
    owner.__dict__[KEPT][key] = made


def matrix_layers(module: nn.Module) -> Mapping[str, AdaptedMatrix]:
    """The converted matrices of a module by name of the parameter."""
    return module.layers() if isinstance(module, AdaptedMatrices) else {}


def _follow(owner: AdaptedMatrices, keys: Any) -> None:
    """After a state dict was loaded into the module and its adapters: frames and W' follow weights and indices."""
    name, loaded, framed, before = owner.__dict__.pop("loaded_as", ("", [], [], {}))
    for key, layer in owner.layers().items():
        full = f"{name}.{key}".lstrip(".")
        indices = layer.indices()
        moved = any(not torch.equal(index, indices[part]) for part, index in before.get(key, {}).items())
        if key in loaded or moved:
            layer.fingerprint = None
            if key not in framed:
                layer.rederive(full)
        if layer.merged:
            layer._show(layer.merged_weight(full)[0])
