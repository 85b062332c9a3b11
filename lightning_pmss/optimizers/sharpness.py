"""SAM and BSAM: optimizers whose step uses gradients at points near the weights, and so prefers flat minima."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor
from typing_extensions import override

from lightning_pmss.layers.parts import is_dtensor, own_part
from lightning_pmss.random_states import random_states, set_random_states

_EPSILON = 1e-12  # beside the norm of a gradient, as published
Values = dict[Tensor, Tensor]
"""A parameter -> this process's part of a value of its shape."""


class SharpnessAware(torch.optim.Optimizer):
    """An optimizer that computes its gradient in several passes and lets a base optimizer apply it.

    ``param_groups`` and ``state`` are those of the base optimizer, so schedules and checkpoints work on it. Under Lightning
    `AdapterCallback` (or `SharpnessPasses`) runs the passes. In a loop of your own, ``step(closure)`` calls the closure once
    for each pass.

    Attributes:
        base_optimizer: Applies the final gradient.
        same_dropout: Whether all passes draw the same random numbers.
        gradient_norm: Norm of all gradients, over the shards of all processes. It knows of DTensors; under FSDP1, whose shards
            look like whole tensors, `SharpnessPasses` replaces it.
    """

    passes = 1
    """Forward and backward passes of a step."""
    driven = False
    """Whether Lightning's loop calls `complete` inside the closure."""

    def __init__(self, params: Iterable[Any], base_optimizer: OptimizerCallable, same_dropout: bool) -> None:
        kind = type(self).__name__
        typed = f"{kind}(params, base_optimizer=functools.partial(torch.optim.AdamW, lr=1e-3))"
        if not callable(base_optimizer):
            raise TypeError(
                f"{kind}: base_optimizer={base_optimizer!r} must make an optimizer from parameters, such as {typed}."
            )
        base = base_optimizer(list(params))
        if not isinstance(base, torch.optim.Optimizer):
            raise TypeError(f"{kind}: base_optimizer made {type(base).__name__}, no torch optimizer. Type {typed}.")
        if isinstance(base, (SharpnessAware, torch.optim.LBFGS)):
            raise ValueError(
                f"{kind}: base_optimizer={type(base).__name__} runs passes of its own. Choose one that applies a gradient, such"
                " as torch.optim.AdamW or torch.optim.SGD."
            )
        self.same_dropout = same_dropout
        self.gradient_norm: Callable[[], Tensor] = self._norm
        self._completed = False
        self._beside: Values = {}  # where the base optimizer starts, if not at the weights
        self.base_optimizer: torch.optim.Optimizer | None = None
        super().__init__(base.param_groups, base.defaults)
        self.base_optimizer = base
        self._share()

    # -- the step -----------------------------------------------------------------------------------------------------

    @override
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Run the passes and the base optimizer's step.

        Args:
            closure: Clears the gradients, computes the loss, calls ``backward`` and returns the loss.

        Returns:
            The loss of the first pass, at the weights.

        Raises:
            RuntimeError: Without a closure, or under Lightning without the callback that runs the passes.
        """
        assert self.base_optimizer is not None
        if closure is None:
            self._refuse_gradients()
            return self.base_optimizer.step()
        self._refuse_lightning(closure)
        self._completed, self._beside = False, {}
        before = random_states() if self.same_dropout else None
        with torch.enable_grad():
            loss = closure()
            if not self._completed:
                self.complete(_with_randomness(closure, before))
        if self._beside and any(p.grad is not None for p in self._beside):
            _write(self._beside)
        self._beside = {}
        self.base_optimizer.step()
        return loss

    @torch.no_grad()
    def complete(self, replay: Callable[[], Any]) -> None:
        """Turn the gradients of the first pass into the final ones, with further passes.

        The parameters are as before afterwards, bit for bit, also after an exception.

        Args:
            replay: Computes the gradients of the same loss at the present parameters; they are None when it is called.

        Raises:
            ValueError: A gradient is sparse.
        """
        self._completed = True
        gradients = self._gradients()
        # Without any gradient too: a process may hold no shard, and the others need it in their passes.
        weights = {p: own_part(p).clone() for p in gradients}
        try:
            final = self._final(weights, gradients, replay)
        finally:
            _write(weights)
        for p in self._parameters():
            if p not in final:
                p.grad = None
            elif p.grad is None:
                p.grad = torch.zeros_like(p)
        _write({p.grad: value for p, value in final.items()})  # type: ignore[misc]

    @abstractmethod
    def _final(self, weights: Values, gradients: Values, replay: Callable[[], Any]) -> Values:
        """The final gradients."""

    def _at(self, point: Mapping[Tensor, Tensor], replay: Callable[[], Any]) -> Values:
        """Gradients with the parameters at a point, which they keep."""
        _write(point)
        for p in self._parameters():
            p.grad = None
        with torch.enable_grad():
            replay()
        return self._gradients()

    # -- gradients ----------------------------------------------------------------------------------------------------

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _gradients(self) -> Values:
        """Copies of this process's gradients."""
        found = {p: p.grad for p in self._parameters() if p.grad is not None}
        if any(gradient.is_sparse for gradient in found.values()):
            raise ValueError(
                f"{type(self).__name__} adds gradients to parameters and cannot use sparse ones. Build the embedding with"
                " `sparse=False`, or train it with another optimizer."
            )
        return {p: own_part(gradient).clone() for p, gradient in found.items()}

    def _norm(self) -> Tensor:
        """Norm of all gradients, over all shards; a collective where there are any."""
        found = [p.grad for p in self._parameters() if p.grad is not None]
        found = [g.float() if g.dtype in (torch.bfloat16, torch.float16) else g for g in found]
        norms = [
            torch.nn.utils.get_total_norm(part)
            for part in ([g for g in found if is_dtensor(g)], [g for g in found if not is_dtensor(g)])
            if part
        ]
        whole = [n.full_tensor() if is_dtensor(n) else n for n in norms]  # type: ignore[attr-defined]
        return torch.linalg.vector_norm(torch.stack(whole)) if whole else torch.zeros(())

    def _refuse_gradients(self) -> None:
        """Accept zero gradients without a closure: loading a sharded checkpoint makes the state by such a step."""
        if any(bool(own_part(p.grad).any()) for p in self._parameters() if p.grad is not None):
            raise RuntimeError(
                f"{type(self).__name__}.step() needs a closure that computes the gradients, since it runs {self.passes} passes:"
                " `optimizer.step(closure)`. Under Lightning use automatic optimization and another precision than '16-mixed'."
            )

    def _refuse_lightning(self, closure: Any) -> None:
        if isinstance(getattr(getattr(closure, "func", None), "__self__", None), Precision) and not self.driven:
            raise RuntimeError(
                f"{type(self).__name__} needs the batches of a step several times, and nothing in this Trainer gives them. Add"
                " AdapterCallback or PMSSCallback to the callbacks, or lightning_pmss.callbacks.SharpnessPasses() for a"
                " training without an adapter."
            )

    # -- what the base optimizer owns ---------------------------------------------------------------------------------

    def _share(self) -> None:
        assert self.base_optimizer is not None
        self.param_groups, self.state = self.base_optimizer.param_groups, self.base_optimizer.state

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer."""
        if self.base_optimizer is None:  # the constructor, with the groups of the base optimizer
            super().add_param_group(param_group)
        else:
            self.base_optimizer.add_param_group(param_group)

    @override
    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state."""
        assert self.base_optimizer is not None
        return self.base_optimizer.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the base optimizer's state."""
        assert self.base_optimizer is not None
        self.base_optimizer.load_state_dict(state_dict)
        self._share()


class SAM(SharpnessAware):
    """Sharpness-aware minimisation (arXiv 2010.01412): the gradient at ``w + rho g / |g|``, applied at w. Two passes a step.

    g is the gradient at w, and ``|g|`` its norm over all trained parameters.

    Args:
        params: Parameters, or groups of them.
        base_optimizer: Makes the optimizer that applies the gradient from ``params``.
        rho: Distance from w, in the space of the trained parameters.
        same_dropout: Draw the same random numbers in both passes, so that both see one loss; otherwise fresh ones.

    Raises:
        TypeError: `base_optimizer` makes no optimizer.
        ValueError: An option is out of its range.

    Example:
        >>> import functools, torch
        >>> from lightning_pmss.optimizers import SAM
        >>> optimizer = SAM([torch.nn.Parameter(torch.ones(2))], functools.partial(torch.optim.SGD, lr=0.1), rho=0.05)
    """

    passes = 2

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-3, weight_decay=0.0),
        rho: float = 0.05,
        same_dropout: bool = True,
    ) -> None:
        self.rho = _positive("SAM", "rho", rho)
        super().__init__(params, base_optimizer, same_dropout)

    @override
    def _final(self, weights: Values, gradients: Values, replay: Callable[[], Any]) -> Values:
        length = self.rho / (self.gradient_norm() + _EPSILON)
        return self._at(_along(weights, gradients, length), replay)


class BSAM(SharpnessAware):
    """Bilateral sharpness-aware minimisation (arXiv 2409.13173). Three passes a step.

    With g the gradient at w, ``h = g / |g|``, g_max the gradient at ``w + rho_max h`` and g_min the one at ``w - rho_min h``,
    the base optimizer applies ``g_max + g - (|g_max| / |g_min|) g_min`` at w. Norms are over all trained parameters.

    Args:
        params: Parameters, or groups of them.
        base_optimizer: Makes the optimizer that applies the gradient from ``params``.
        rho_max: Distance from w along the gradient.
        rho_min: Distance from w against the gradient.
        rho_min_follows_lr: Multiply `rho_min` by the learning rate of the first group over the highest one of its schedule,
            as the official code does.
        same_dropout: Draw the same random numbers in all passes, so that all see one loss; otherwise fresh ones.
        published: Start the base optimizer's step at ``w - rho_min h``, as the official code does by an alias of two tensors.

    Raises:
        TypeError: `base_optimizer` makes no optimizer.
        ValueError: An option is out of its range.

    Example:
        >>> import functools, torch
        >>> from lightning_pmss.optimizers import BSAM
        >>> optimizer = BSAM([torch.nn.Parameter(torch.ones(2))], functools.partial(torch.optim.SGD, lr=0.1))
    """

    passes = 3

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-3, weight_decay=0.0),
        rho_max: float = 0.05,
        rho_min: float = 0.05,
        rho_min_follows_lr: bool = True,
        same_dropout: bool = True,
        published: bool = False,
    ) -> None:
        self.rho_max, self.rho_min = _positive("BSAM", "rho_max", rho_max), _positive("BSAM", "rho_min", rho_min)
        self.rho_min_follows_lr, self.published = rho_min_follows_lr, published
        super().__init__(params, base_optimizer, same_dropout)
        self._first_lr = float(self.param_groups[0].get("lr", 0.0))

    @override
    def _final(self, weights: Values, gradients: Values, replay: Callable[[], Any]) -> Values:
        unit = 1 / (self.gradient_norm() + _EPSILON)
        upper = self._at(_along(weights, gradients, self.rho_max * unit), replay)
        norm_upper = self.gradient_norm()
        below = _along(weights, gradients, -self._rho_min() * unit)
        lower = self._at(below, replay)
        norm_lower = self.gradient_norm()
        if self.published:
            self._beside = below
        # Where g_min is zero, so is its term.
        factor = torch.where(norm_lower > 0, norm_upper / norm_lower, 0.0)
        final: Values = {}
        for p in self._parameters():
            terms = [gradients.get(p), upper.get(p), None if p not in lower else -factor * lower[p]]
            if any(term is not None for term in terms):
                final[p] = sum(term for term in terms if term is not None)  # type: ignore[assignment]
        return final

    def _rho_min(self) -> float:
        """`rho_min` of this step."""
        group = self.param_groups[0]
        if not self.rho_min_follows_lr or "lr" not in group:
            return self.rho_min
        highest = float(group.get("max_lr", group.get("initial_lr", self._first_lr)))  # OneCycleLR has the first
        return self.rho_min * float(group["lr"]) / highest if highest > 0 else self.rho_min


def _positive(kind: str, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (math.isfinite(value) and value > 0):
        raise ValueError(f"{kind}: {name}={value!r} must be a positive number, such as 0.05.")
    return float(value)


def _along(weights: Values, gradients: Values, length: Tensor) -> Values:
    """The weights moved by a multiple of the gradients."""
    return {p: weight + gradients[p] * length for p, weight in weights.items()}


def _write(values: Mapping[Tensor, Tensor]) -> None:
    for place, value in values.items():
        own_part(place).copy_(value)


def _with_randomness(closure: Callable[[], Any], states: Mapping[str, Any] | None) -> Callable[[], Any]:
    """A closure that draws the random numbers from these states, and leaves those of the process as they are."""
    if states is None:
        return closure

    def replay() -> None:
        now = random_states()
        set_random_states(states)
        try:
            closure()
        finally:
            set_random_states(now)

    return replay
