"""Fused experts with adapters: the module that keeps them, its forward pass, and each expert's converted layer.

transformers computes such a module in one of several ways (a loop, batched or grouped products), which give the same numbers
up to rounding. With adapters it is always computed by grouped products: tokens are sorted by expert, and each of the two
parameters gives one product of all experts, to which the method adds that of its stacked tensors. Merged or disabled, the
module is computed as before its conversion.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_pmss.layers.adapted import AdaptedLinear, adapted_class, rebuilt
from lightning_pmss.layers.adapter import Adapter
from lightning_pmss.layers.expert_layer import FUSED, ExpertLinear, expert_layers, one_by_one, projections
from lightning_pmss.layers.expert_stack import ExpertStack, StackSlice
from lightning_pmss.layers.grouped import Groups
from lightning_pmss.layers.guard import refuse_training
from lightning_pmss.layers.layout import Layout
from lightning_pmss.layers.matrices import MATRIX_SUFFIX
from lightning_pmss.layers.merged_layer import LayerDrift, merge_update
from lightning_pmss.layers.owners import AdaptedOwner, owner_class, stored_tensors
from lightning_pmss.layers.parts import clean_name, is_dtensor
from lightning_pmss.layers.products import core_dtype

if TYPE_CHECKING:
    from lightning_pmss.methods.method import Method

_SUFFIX = "_adapter"


class AdaptedExpert(AdaptedLinear):
    """Mixin: one expert's converted layer. Its tensors are views of the stack's."""

    owner: Any
    key: str
    index: int

    @property
    def stack(self) -> ExpertStack:
        """The adapters of all experts of the parameter."""
        found: ExpertStack = self.owner.stacks()[self.key]
        return found

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("index_names", ()):
            return getattr(self.stack, name)[self.index]
        return super().__getattr__(name)

    def indices_on(self, device: torch.device) -> tuple[Tensor, ...]:
        """Views of the stack's, which follow the model to its device."""
        return tuple(getattr(self, name).to(device) for name in self.index_names)

    def ran(self) -> bool:
        """Whether a token came to this expert in a training pass."""
        seen = self.stack.seen
        return seen is not None and bool(seen[self.index])

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> Any:
        """On the stack: nobody calls an expert by itself."""
        return self.stack.register_forward_hook(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return rebuilt, (type(self.method), self.base_class, AdaptedExpert), self.__dict__


class AdaptedExperts(AdaptedOwner):
    """Mixin that gives a module of fused experts adapters; instances are made by `adopt_experts`."""

    def stacks(self) -> dict[str, ExpertStack]:
        """By name of the parameter."""
        found = {key: self._modules.get(f"{key}{_SUFFIX}") for key in projections(self)}
        return {key: stack for key, stack in found.items() if isinstance(stack, ExpertStack)}

    def layers(self) -> dict[str, AdaptedExpert]:
        """The converted layers, by their names behind the module's."""
        own: Mapping[str, nn.Module] = expert_layers(self)
        return {name: x for name, x in own.items() if isinstance(x, AdaptedExpert)}

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Of tokens ``[tokens, hidden]``, their experts and the weights of these, both ``[tokens, k]``."""
        if self.disabled or self.merged:
            output: Tensor = self.base_class.forward(self, hidden_states, top_k_index, top_k_weights)
            if self.disabled:
                return output
            stack = next(iter(self.stacks().values()))
            return refuse_training(self, output, next(iter(stack.core.trained().values())), stack.method.trained)
        experts: Any = self
        up, down = projections(self)
        groups = Groups(top_k_index, len(getattr(self, up)))
        count = top_k_index.shape[-1]
        x = self._project(up, hidden_states[groups.order // count], groups)
        x = experts._apply_gate(x) if experts.has_gate else experts.act_fn(x)
        x = self._project(down, x, groups)
        if experts.has_post_expert_norm:
            x = experts.post_expert_norm(x)
        weighted = x * top_k_weights.reshape(-1)[groups.order].unsqueeze(-1)
        before = torch.empty_like(groups.order)
        before[groups.order] = torch.arange(len(before), device=before.device)
        return weighted[before].view(len(hidden_states), count, -1).sum(1).to(hidden_states.dtype)

    def _project(self, key: str, x: Tensor, groups: Groups) -> Tensor:
        experts: Any = self
        weight: Tensor = getattr(self, key)  # FSDP1 makes it a plain attribute where a block is computed again
        stack, transposed = self._modules.get(f"{key}{_SUFFIX}"), experts.is_transposed
        if stack is None:
            y: Tensor = groups.linear(x, weight, transposed=transposed)
        else:
            y = stack(x, weight, transposed, groups)
        return y + getattr(self, f"{key}_bias")[groups.ids].to(y.dtype) if experts.has_bias else y

    # -- merging, state dicts -----------------------------------------------------------------------------------------

    def adapter_key(self, key: str) -> bool:
        """What the stacks own."""
        return any(key.startswith(f"{name}{_SUFFIX}.") for name in self.stacks())

    @torch.no_grad()
    def plain_weights(self, name: str) -> tuple[dict[str, Tensor], dict[int, LayerDrift]]:
        """See `Mergeable`."""
        drift: dict[int, LayerDrift] = {}
        merged = {key: torch.empty_like(self._parameters[key]) for key in self.stacks()}  # type: ignore[arg-type]
        for own, layer in self.layers().items():
            value, drift[id(layer)] = layer.merged_weight(f"{name}.{own}".lstrip("."))
            merged[layer.key][layer.index].copy_(self._stored(value))
        return merged, drift

    def plain_from(self, state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """See `Mergeable`."""
        found = {}
        for key, stack in self.stacks().items():
            start = f"{prefix}{key}{_SUFFIX}."
            tensors = stored_tensors(state, f"{prefix}{key}", start, stack.core, stack.index_names)
            merged = torch.empty_like(state[f"{prefix}{key}"])
            for i in range(len(merged)):
                update = stack.method.update_of({n: t[i] for n, t in tensors.items()}, stack.scale)
                weight = self._stored(state[f"{prefix}{key}"][i])
                value, _ = merge_update(weight, update.to(weight.device), weight.dtype, f"{prefix}{key}.{i}")
                merged[i].copy_(self._stored(value))
            found[key] = merged
        return found

    def _stored(self, weight: Tensor) -> Tensor:
        """One expert's matrix from canonical layout to the parameter's, or back."""
        return weight.T if self.is_transposed else weight  # type: ignore[return-value, operator]

    @contextmanager
    def _pristine_in_place(self) -> Iterator[None]:
        """Inside, the parameters are the pristine ones; what is put in their place becomes pristine."""
        if not self.merged:
            yield
            return
        shown = {key: self._parameters[key] for key in self.stacks()}
        layers = self.layers().values()
        for key, parameter in shown.items():
            assert parameter is not None
            matrices = [self._stored(layer.stored_weight) for layer in layers if layer.key == key]
            whole = torch.stack([matrix.to(parameter.device) for matrix in matrices])
            self._parameters[key] = nn.Parameter(whole, requires_grad=False)
        try:
            yield
        finally:
            for layer in layers:
                layer._keep(layer.weight.detach().to("cpu", copy=True))
            self._parameters.update(shown)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        loaded = [key for key in self.stacks() if f"{prefix}{key}" in state_dict]
        frames = f"{_SUFFIX}.core.frame."
        framed = any(key.startswith(prefix) and frames in key for key in state_dict)
        before = {key: [index.clone() for index in stack.indices()] for key, stack in self.stacks().items()}
        # For `_follow`: the stacks are loaded after this.
        self.__dict__["loaded_as"] = prefix[:-1], loaded, framed, before


def adopt_experts(
    layers: Sequence[ExpertLinear],
    method: Method[Any],
    rank: int,
    starts: Sequence[Mapping[str, Tensor]],
    derived: Sequence[Mapping[str, Tensor]],
    scale: float,
) -> None:
    """Give all experts of one fused parameter adapters, in place: module, parameters and layers stay the same objects.

    Args:
        layers: Of every expert, in order.
        method: See `AdaptedLinear`.
        rank: Of all of them.
        starts: The trained tensors at first, of each.
        derived: Frozen and index tensors, of each.
        scale: See `AdaptedLinear`.
    """
    experts, key = layers[0].owner, layers[0].key
    if not isinstance(experts, AdaptedExperts):
        experts.__class__ = owner_class(AdaptedExperts, type(experts))
        experts.register_load_state_dict_post_hook(_follow)
    weight = layers[0].weight
    stack = ExpertStack(
        method,
        rank,
        scale,
        (layers[0].out_features, layers[0].in_features),
        _stacked(starts),
        _stacked(derived),
        weight.device,
        core_dtype(weight.dtype),
    )
    stack.train(experts.training)
    experts.add_module(f"{key}{_SUFFIX}", stack)
    made: Sequence[nn.Module] = layers
    for index, layer in enumerate(made):
        base: Any = type(layer)
        layer.__class__ = adapted_class(type(method), base, AdaptedExpert)
        assert isinstance(layer, AdaptedExpert)
        layer.index_names = stack.index_names
        layer.core = StackSlice(stack, index)
        layer.method, layer.rank, layer.scale = method, rank, float(scale)
        layer.layout, layer.quantised = Layout.LINEAR, False
        layer.fingerprint = layer.pristine = layer.derived_dtype = None
        layer.on_trust = weight.is_meta
        method.prepare(layer)


def called_core(layer: AdaptedLinear) -> Adapter:
    """The `Adapter` that a pass calls: of an expert, the one with the tensors of all experts of its parameter."""
    return layer.stack.core if isinstance(layer, AdaptedExpert) else layer.core


def has_experts(model: nn.Module) -> bool:
    """Whether fused experts of a model are converted."""
    return any(isinstance(module, AdaptedExperts) for module in model.modules())


def _stacked(tensors: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([own[name] for own in tensors]) for name in tensors[0]}


def _follow(experts: AdaptedExperts, keys: Any) -> None:
    """After a state dict was loaded into the module and its stacks: frames and W' follow weights and indices."""
    name, loaded, framed, before = experts.__dict__.pop("loaded_as", ("", [], True, {}))
    stacks, changed = experts.stacks(), set(loaded)
    for key, indices in before.items():
        pairs = zip(indices, stacks[key].indices(), strict=True)
        if any(not old.is_meta and not torch.equal(old, new) for old, new in pairs):
            changed.add(key)
    layers = {own: x for own, x in experts.layers().items() if x.key in changed or x.merged}
    derived = not framed and any(stacks[key].core.has_frozen() for key in changed)
    for own, layer in one_by_one(layers.items()) if derived else layers.items():
        full = f"{name}.{own}".lstrip(".")
        if layer.key in changed:
            if not is_dtensor(experts._parameters[layer.key]):  # type: ignore[arg-type]
                layer.fingerprint = None  # else it was taken before sharding, or is compared when training starts
            if derived:
                layer.rederive(full)
        if layer.merged:
            layer._show(layer.merged_weight(full)[0])


def names_of_modules(model: nn.Module) -> dict[int, str]:
    """Clean full name by ``id`` of every module, and of the converted layers of experts and other parameters."""
    found = {id(module): clean_name(name) for name, module in model.named_modules()}
    for module in model.modules():
        if isinstance(module, AdaptedOwner):
            own = found[id(module)]
            layers: Mapping[str, nn.Module] = module.layers()
            found |= {id(layer): f"{own}.{name}".lstrip(".") for name, layer in layers.items()}
    return found


def without_stacks(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict under clean names with each layer's tensors under its name, of experts and of other parameters."""
    found: dict[str, Any] = {}
    for key, value in state.items():
        owner, separator, part = key.partition(f"{_SUFFIX}.")
        if separator and owner.rpartition(".")[2] in FUSED and isinstance(value, Tensor) and value.dim() > 1:
            found |= {f"{owner}.{i}.{part}": own for i, own in enumerate(value)}
        elif f"{MATRIX_SUFFIX}." in key:
            found[key.replace(f"{MATRIX_SUFFIX}.", ".")] = value
        else:
            found[key] = value
    return found
