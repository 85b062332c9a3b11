"""Check after the first backward passes that the adapter of every layer gets a gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_pmss.layers.adapted import AdaptedLinear
from lightning_pmss.layers.experts import called_core
from lightning_pmss.layers.matrix_layer import MatrixLinear
from lightning_pmss.messages import some


class GradientCheck:
    """Check that every layer's adapter gets a finite gradient. A zero one also gets it, so a missing one means a broken graph.

    Args:
        layers: Converted layers by canonical name.
        infinities_are_normal: Whether infinite gradients are accepted, as a loss scaler makes them in its first steps.
        sharded: Whether an engine shards the adapter. It frees gradients early, and gives none to a rank without a shard: the
            gradient of the core's output is checked instead.
    """

    def __init__(
        self, layers: Mapping[str, AdaptedLinear], *, infinities_are_normal: bool = False, sharded: bool = False
    ) -> None:
        self.layers = dict(layers)
        self._trained = next((layer.method.trained for layer in self.layers.values()), "the adapter")
        self.infinities_are_normal = infinities_are_normal
        self._called: set[str] = set()
        self._ran_untrained: set[str] = set()
        self._looked = False
        self._hooks: list[Any] = []
        self._passed: dict[str, bool] | None = {} if sharded else None  # name -> whether its gradient was finite
        if sharded:
            cores: dict[nn.Module, list[str]] = {}
            for name, layer in self.layers.items():
                cores.setdefault(called_core(layer), []).append(name)
            self._hooks = [core.register_forward_hook(self._watching(names)) for core, names in cores.items()]

    def _gradient(self, name: str) -> bool | None:
        """Whether a layer's gradient is finite; None without a gradient."""
        if self._passed is not None:
            return self._passed.get(name)
        grads = self.layers[name].core.gradients().values()
        return all(bool(torch.isfinite(grad).all()) for grad in grads) if grads else None

    def check(self, where: str) -> bool:
        """Check the gradients after a backward pass; return whether the check is complete.

        Args:
            where: The batch, for messages.

        Raises:
            MisconfigurationException: No layer got a gradient, one got none although its layer ran, or one is not finite.
        """
        found = {name: self._gradient(name) for name in self.layers}
        silent = [name for name, finite in found.items() if finite is None]
        if len(silent) == len(self.layers) or (cut_off := [n for n in silent if n in self._called]):
            names = silent if len(silent) == len(self.layers) else cut_off
            self._remove_hooks()
            raise MisconfigurationException(
                f"No gradient reached {self._trained} of {len(names)} of {len(self.layers)} converted layers: {some(names)}."
                " Usual causes: re-entrant activation checkpointing over frozen inputs (use `use_reentrant=False`, or call"
                " `enable_input_require_grads()`), a `torch.no_grad()` or `detach()` around the model, or a parent that"
                " reads the layer's `weight` instead of calling it (list such layers in `exclude_modules`). A reference or"
                " teacher is left out if it is frozen and in eval mode before `fit`."
            )
        if not self.infinities_are_normal:
            broken = [name for name, finite in found.items() if finite is False]
            if broken:
                raise MisconfigurationException(
                    f"{self._trained} of {len(broken)} converted layers"
                    f" got NaN or infinite gradients in the first step: {some(broken)}"
                    f" ({where})."
                    " The loss is not finite or the learning rate's warm-up is missing; check the batch and the base model."
                )
        if idle := [name for name, layer in self.layers.items() if name not in silent and not layer.ran()]:
            rank_zero_warn(
                f"{self._trained} of {len(idle)} of {len(self.layers)} converted layers got a gradient of zero, since no token"
                f" reached these experts in the first step: {some(idle)}. They train as soon as tokens reach them."
            )
        if not silent:
            self._remove_hooks()
            return True
        if self._looked:  # the second pass: these layers did not run, or ran without training
            self._remove_hooks()
            self._warn(silent)
            return True
        self._looked = True
        for name in silent:
            self._hooks.append(self.layers[name].register_forward_hook(self._noting(name)))
        return False

    def _warn(self, silent: list[str]) -> None:
        ran = [name for name in silent if name in self._ran_untrained]
        experts = [name for name in silent if name not in ran and "experts" in name.split(".")]
        matrices = [name for name in silent if name not in ran and isinstance(self.layers[name], MatrixLinear)]
        others = [name for name in silent if name not in (*ran, *experts, *matrices)]
        if matrices:
            rank_zero_warn(
                f"{self._trained} of {some(matrices)} got no gradient: the forward pass of the module that owns the parameter"
                " did not run in the first two steps. Where a parent reads the parameter itself, it gets W without the update."
                " Then take it out of target_parameters, and train it in full with also_train."
            )
        if ran:
            rank_zero_warn(
                f"{self._trained} of {len(ran)} converted layers"
                " gets no gradient, since these layers ran in evaluation mode or without"
                f" gradients only: {some(ran)}. If they belong to a reference, teacher or metric, freeze them and call `eval()`"
                " before `fit`, or list them in `exclude_modules`; if they are to be adapted, call `train()`."
            )
        if experts:
            rank_zero_warn(
                f"{self._trained} of {len(experts)} converted layers"
                " got no gradient, since no token reached these experts in the first two"
                f" steps: {some(experts)}. If that stays so, list them in `exclude_modules`."
            )
        if others:
            rank_zero_warn(
                f"{self._trained} of {len(others)} converted layers"
                " got no gradient, since the layers did not run in the first two steps:"
                f" {some(others)}. If the model never uses them, list them in `exclude_modules`."
            )

    def _watching(self, names: Sequence[str]) -> Any:
        def note(grad: Tensor) -> None:
            assert self._passed is not None
            finite = bool(torch.isfinite(grad).all())
            self._passed |= {name: finite and self._passed.get(name, True) for name in names}

        def hook(module: nn.Module, args: Any, output: dict[str, Tensor]) -> None:
            for value in output.values():
                if value.requires_grad:
                    value.register_hook(note)

        return hook

    def _noting(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            (self._called if module.training else self._ran_untrained).add(name)

        return hook

    def _remove_hooks(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()
