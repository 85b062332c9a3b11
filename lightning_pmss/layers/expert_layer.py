"""Fused experts: which modules keep them, and each expert's matrix as a linear layer of its own.

transformers keeps the experts of a mixture in two 3-D parameters, ``gate_up_proj`` and ``down_proj``, of one module, and
computes with both in that module's forward. There is no layer to convert. Here each expert's matrix is presented as one: a
module that owns nothing, is in no model's tree, and whose ``weight`` is a view of the parameter in canonical layout
``[out, in]``. Everything that treats a layer for itself (selection, updates, adapter files, merging, reports) then treats an
expert. The forward pass works on all experts at once (`lightning_pmss.layers.experts`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn

from lightning_pmss.layers.matrix_layer import OwnedLinear
from lightning_pmss.layers.matrix_layer import holder as holder
from lightning_pmss.layers.parts import is_dtensor, is_zero_partitioned, own_part, whole, whole_shape
from lightning_pmss.layers.products import FLOATS

# What transformers' `use_experts_implementation` gives each instance. The core never imports transformers.
_CONTRACT = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "_is_expert_parallel")
_KEPT = "pmss_experts"
_WHOLE = "pmss_whole"  # parameters that are whole for the moment, see `whole_parameter`
FUSED = ("gate_up_proj", "up_proj", "down_proj")  # names of the parameters

L = TypeVar("L", bound=nn.Module)


def is_fused_experts(module: nn.Module) -> bool:
    """Whether a module keeps experts in 3-D parameters and follows transformers' experts interface."""
    if _KEPT in module.__dict__:  # it was one when they were first asked for; FSDP1 flattens parameters
        return True
    if not all(name in module.__dict__ for name in _CONTRACT) or not hasattr(module, "_apply_gate"):
        return False
    found = [module._parameters.get(key) for key in projections(module)]
    return all(p is not None and len(whole_shape(p)) == 3 for p in found)


def projections(experts: Any) -> tuple[str, str]:
    """The names of the two parameters, in the order in which a token passes them."""
    gated, plain, down = FUSED
    return (gated if experts.has_gate else plain), down


class ExpertLinear(OwnedLinear):
    """One expert's matrix, without a bias: that of the expert is added by its module.

    Attributes:
        owner: Module that keeps the experts.
        key: Name of its parameter.
        index: Number of the expert.
    """

    index: int

    def __init__(self, owner: nn.Module, key: str, index: int) -> None:
        super().__init__(owner, key, canonical_sides(owner, key))
        self.index = index

    @property
    def own_name(self) -> str:
        """The layer's name behind the owner's."""
        return f"{self.key}.{self.index}"

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """A view ``[out, in]`` of the parameter, also where the owner stores ``[in, out]``.

        Where an engine keeps the parameter in parts, this is an empty tensor of its dtype and device: see `whole_parameter`.
        """
        parameter = self.parameter
        if self.in_parts:
            return own_part(parameter).new_empty(0)
        matrix = parameter[self.index]
        return matrix.T if self.owner.is_transposed else matrix

    @property
    def parameter(self) -> Tensor:
        """The parameter of all experts, as the owner keeps it or, inside `whole_parameter`, whole."""
        found: Tensor = self.owner.__dict__.get(_WHOLE, {}).get(self.key, self.owner._parameters[self.key])
        return found

    @property
    def in_parts(self) -> bool:
        """Whether the parameter is not whole on this process."""
        return is_dtensor(self.parameter) or self.parameter.dim() != 3

    def why_unusable(self) -> str | None:
        """Why the parameter cannot be converted, a sentence without its full stop; None if it can."""
        parameter = self.owner._parameters[self.key]
        if parameter.dtype not in FLOATS:
            kind = str(parameter.dtype).removeprefix("torch.")
            return f"its experts are kept in codes ({kind}), which lightning-pmss does not read"
        if self.owner._is_expert_parallel:
            return "its experts are spread over several processes (expert parallelism)"
        if is_dtensor(parameter):
            return (
                "its experts are sharded already; call `model_built(self)`, which converts them, before `fully_shard`"
            )
        return None

    def requires_grad_(self, requires_grad: bool = True) -> ExpertLinear:
        """Refused: the parameter belongs to all experts."""
        raise ValueError(
            f"expert {self.index} of {self.key} cannot be trained in full alone; name the module of the experts."
        )


def canonical_sides(experts: Any, key: str) -> tuple[int, int]:
    """``(out, in)`` of one expert's matrix."""
    _, first, second = whole_shape(experts._parameters[key])
    return (second, first) if experts.is_transposed else (first, second)


def expert_layers(experts: nn.Module) -> dict[str, ExpertLinear]:
    """The layers by name behind the module's own, ``gate_up_proj.0`` and so on; the same objects at each call."""
    kept: dict[str, ExpertLinear] | None = experts.__dict__.get(_KEPT)
    stored = [experts._parameters.get(key) for key in projections(experts)]
    if kept is not None and any(p is None or len(whole_shape(p)) != 3 for p in stored):
        return kept  # FSDP1 flattens parameters, and takes them away where a block is computed again
    sizes = {key: len_of(experts, key) for key in projections(experts)}
    if kept is None or len(kept) != sum(sizes.values()):
        kept = {f"{key}.{i}": ExpertLinear(experts, key, i) for key, size in sizes.items() for i in range(size)}
        experts.__dict__[_KEPT] = kept
    return kept


def len_of(experts: nn.Module, key: str) -> int:
    """Number of experts in a parameter."""
    parameter = experts._parameters[key]
    assert parameter is not None
    return whole_shape(parameter)[0]


def label(name: str, layer: nn.Module) -> str:
    """How a layer is listed: an expert's by its parameter."""
    return parameter_name(name) if isinstance(layer, ExpertLinear) else name


def is_expert_name(name: str) -> bool:
    """Whether a layer of this name is an expert's."""
    owner, _, index = name.rpartition(".")
    return index.isdigit() and owner.rpartition(".")[2] in FUSED


def refuse_experts(layers: Mapping[str, nn.Module], lacking: str, instead: str) -> None:
    """Refuse what is not there for fused experts.

    Args:
        layers: Layers by name.
        lacking: What is not there, before the experts' name: ``"select reads no"``.
        instead: What to do instead of leaving them out.

    Raises:
        ValueError: One of the layers is an expert's.
    """
    if found := next((name for name, layer in layers.items() if isinstance(layer, ExpertLinear)), None):
        raise ValueError(
            f"{lacking} fused experts, such as `{parameter_name(found)}`. Convert without them:"
            f" exclude_modules=['experts']; or {instead}."
        )


def parameter_name(name: str) -> str:
    """The parameter's name, from that of a layer in it."""
    return name.rpartition(".")[0]


@contextmanager
def whole_parameter(layer: ExpertLinear) -> Iterator[None]:
    """Inside, the layers of all experts of a parameter read it whole; a collective where FSDP2 or ZeRO-3 keeps it in parts."""
    parameter = layer.owner._parameters[layer.key]
    if not layer.in_parts or not (is_dtensor(parameter) or is_zero_partitioned(parameter)):
        yield
        return
    held: dict[str, Tensor] = layer.owner.__dict__.setdefault(_WHOLE, {})
    with whole(parameter) as found:
        held[layer.key] = found
        try:
            yield
        finally:
            del held[layer.key]


def one_by_one(layers: Iterable[tuple[str, L]]) -> Iterator[tuple[str, L]]:
    """The same pairs of name and layer, to be read: the parameter of an expert is whole, and gathered once for all of them."""
    with ExitStack() as stack:
        held: tuple[int, str] | None = None
        for name, layer in layers:
            place = (id(layer.owner), layer.key) if isinstance(layer, ExpertLinear) else None
            if held != place:
                stack.close()
                held = place
                if isinstance(layer, ExpertLinear):
                    stack.enter_context(whole_parameter(layer))
            yield name, layer
