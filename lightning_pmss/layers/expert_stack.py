"""The adapters of all experts of one fused parameter: stacked tensors, of which each expert's layer sees its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_pmss.layers.adapter import Adapter, Tensors
from lightning_pmss.layers.grouped import Groups, canonical, outer_sums, products
from lightning_pmss.layers.indices import IndexTensors
from lightning_pmss.layers.parts import fill, is_dtensor, is_zero_partitioned, whole

if TYPE_CHECKING:
    from lightning_pmss.methods.method import Method, Update


class ExpertStack(IndexTensors):
    """Owns the stacked tensors of one fused parameter ``[experts, ...]``; a child of the module that keeps the experts.

    Attributes:
        method, rank, scale: Of every expert; see `AdaptedLinear`.
        core: Owner of the trained tensors and of those derived from W, each with the experts in front.
        index_names: Of the index tensors, int64 ``[experts, k]``.
        seen: Whether an expert got a token in a training pass since `forget`, bool ``[experts]``; None before the first.
    """

    method: Method[Any]
    index_names: tuple[str, ...]  # type: ignore[misc]

    def __init__(
        self,
        method: Method[Any],
        rank: int,
        scale: float,
        shape: tuple[int, int],
        start: Mapping[str, Tensor],
        derived: Mapping[str, Tensor],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.method, self.rank, self.scale, self.shape = method, rank, float(scale), shape
        indices = {name: t for name, t in derived.items() if not t.is_floating_point()}
        frozen = {name: t.to(dtype) for name, t in derived.items() if t.is_floating_point()}
        self.index_names = tuple(indices)
        self.set_indices(device, **indices)
        self.core = Adapter(method.stacked_values, {name: t.to(dtype) for name, t in start.items()}, frozen, device)
        self.seen: Tensor | None = None

    @property
    def experts(self) -> int:
        """Number of experts."""
        return len(next(iter(self.core.trained().values())))

    def indices(self) -> tuple[Tensor, ...]:
        """The index tensors, in the order of their names."""
        return tuple(getattr(self, name) for name in self.index_names)

    def index_sizes(self) -> dict[str, int]:
        specs = self.method.specs(self.shape, self.rank)
        return {name: specs[name].below for name in self.index_names}

    def forward(self, x: Tensor, weight: Tensor, transposed: bool, groups: Groups) -> Tensor:
        """``W'_e x`` of each pair of token and expert, without a bias.

        Args:
            x: ``[pairs, in]``.
            weight: The parameter, ``[experts, out, in]`` or ``[experts, in, out]``.
            transposed: Whether it is the latter.
            groups: Of the pairs.
        """
        if self.training and torch.is_grad_enabled():
            seen = groups.seen()
            self.seen = seen if self.seen is None else self.seen | seen
        index = dict(zip(self.index_names, self.indices_on(x.device), strict=True))
        return self.method.grouped(GroupedLayer(weight, transposed, index, self, groups), x)

    def extra_repr(self) -> str:
        return f"{self.method.config.method}(rank={self.rank})"


@dataclass(frozen=True)
class GroupedLayer:
    """What a method sees of all experts in one pass; `x` is always ``[pairs, in]``, sorted by expert.

    Attributes:
        stored: The frozen parameter, whose memory an engine may take away between the passes.
        transposed: Whether it is ``[experts, in, out]``.
        indices: Index tensors, int64 ``[experts, k]``.
        stack: Owner of the adapters.
        groups: Which token is whose.
    """

    stored: Tensor
    transposed: bool
    indices: Mapping[str, Tensor]
    stack: ExpertStack
    groups: Groups

    @property
    def weight(self) -> Tensor:
        """W ``[experts, out, in]``: a view, not to be kept for the backward pass."""
        return canonical(self.stored, self.transposed)

    @property
    def training(self) -> bool:
        """Whether the layer is in training mode."""
        return self.stack.training

    def values(self) -> Tensors:
        """The floating-point tensors of the update, with the experts in front."""
        found: Tensors = self.stack.core(self.stack.scale)
        return found

    def base(self, x: Tensor) -> Tensor:
        """``W x``."""
        return self.groups.linear(x, self.stored, transposed=self.transposed)

    def part(self, x: Tensor, index: Tensor, dim: int) -> Tensor:
        """The product with rows (dim 0) or columns (dim 1) ``index [experts, k]`` of each W."""
        return self.groups.linear(x, self.stored, index, dim, self.transposed)

    def linear(self, x: Tensor, matrices: Tensor) -> Tensor:
        """``M x`` with matrices ``[experts, out, in]``."""
        return self.groups.linear(x, matrices)

    def change(self, x: Tensor, values: Mapping[str, Tensor], update: type[Update]) -> Tensor:
        """``(W' - W) x`` of any update: by its thin factors, or of the change itself, which is formed anew for the backward."""
        names = tuple(values)

        def one(weight: Tensor, index: Tensors, *tensors: Tensor) -> Any:
            return update(**index, **dict(zip(names, tensors, strict=True)))

        if update.has_factors():
            dtype = next(iter(values.values())).dtype

            def factors(weight: Tensor, index: Tensors, *tensors: Tensor) -> tuple[Tensor, Tensor]:
                found = one(weight, index, *tensors).factors(weight, dtype)
                return found.a, found.b

            a, b = torch.func.vmap(factors)(self.weight, dict(self.indices), *values.values())
            return self.linear(self.linear(x, a), b)

        def delta(weight: Tensor, *tensors: Tensor) -> Tensor:
            weight = weight.T if self.transposed else weight
            change: Tensor = one(weight, {}, *tensors).delta(weight, dtype=tensors[0].dtype)
            return change

        assert not self.indices, "an update with indices has thin factors"
        changed: Tensor = FormedChange.apply(x, self.stored, self.groups, torch.func.vmap(delta), *values.values())
        return changed


class FormedChange(torch.autograd.Function):
    """``dW_e x`` with ``dW = form(W, *values) [experts, out, in]``, W as stored.

    Kept for backward: x, the values, and the parameter W itself, as in `GroupedProduct`.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, groups: Groups, form: Callable[..., Tensor], *values: Tensor
    ) -> Tensor:
        ctx.groups, ctx.form = groups, form
        ctx.save_for_backward(x, weight, *values)
        return products(x, form(weight, *values).to(x.dtype).mT, groups)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight, *values = ctx.saved_tensors
        with torch.enable_grad():
            own = [value.detach().requires_grad_() for value in values]
            change = ctx.form(weight, *own)
        grad_x = products(grad, change.detach().to(grad.dtype), ctx.groups) if ctx.needs_input_grad[0] else None
        found = torch.autograd.grad(change, own, outer_sums(grad, x, ctx.groups).to(change.dtype))
        return grad_x, None, None, None, *found


class StackSlice(Adapter):
    """One expert's view of a stack's `Adapter`: its tensors are views, so that writing to them changes the stack."""

    def __init__(self, stack: ExpertStack, index: int) -> None:
        nn.Module.__init__(self)
        self.__dict__["owner"] = stack  # no child
        self.index = index

    @property
    def stack(self) -> ExpertStack:
        """The owner of the tensors."""
        found: ExpertStack = self.__dict__["owner"]
        return found

    def forward(self, scale: float = 1.0) -> Tensors:
        """See `Adapter`."""
        return self.stack.method.values(self.trained() | self.frozen(), scale)

    def trained(self) -> Tensors:
        """Views of the trained tensors."""
        return {name: tensor[self.index] for name, tensor in self.stack.core.trained().items()}

    def frozen(self) -> Tensors:
        """Views of the frozen tensors."""
        return {name: tensor[self.index] for name, tensor in self.stack.core.frozen().items()}

    def has_frozen(self) -> bool:
        """Whether the stack has frozen tensors."""
        return self.stack.core.has_frozen()

    def set_frozen(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the values of this expert's."""
        with torch.no_grad():
            for name, own in self.stack.core.frozen().items():
                if name not in tensors:
                    continue
                if is_dtensor(own) or is_zero_partitioned(own):  # a part of this process is no part of an expert
                    with whole(own) as value:
                        value = value.clone()
                    value[self.index] = tensors[name].reshape(value.shape[1:])
                    fill(own, value)
                else:
                    own[self.index].copy_(tensors[name].reshape(own.shape[1:]))

    def owned(self) -> list[nn.Parameter]:
        """The stack's trained parameters, of all experts."""
        return self.stack.core.owned()

    def reshape(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Adapter`; of all experts at once, so the first of them reshapes the stack and each has its values copied."""
        many = {name: tensors[name].expand(self.stack.experts, *tensors[name].shape) for name in self.trained()}
        self.stack.core.reshape(many)

    def parameters(self, recurse: bool = True) -> Any:
        """The same."""
        return iter(self.owned())

    def gradients(self) -> Tensors:
        """Of the trained tensors, as far as there are any."""
        return {name: grad[self.index] for name, grad in self.stack.core.gradients().items()}
