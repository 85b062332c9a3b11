"""Train with noise on the merged weight, so that the minimum found is a flat one."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from typing_extensions import override

from lightning_pmss.conversion.convert import adapted_layers
from lightning_pmss.layers.adapted import AdaptedLinear
from lightning_pmss.layers.expert_layer import refuse_experts
from lightning_pmss.layers.matrix_layer import MatrixLinear
from lightning_pmss.layers.operators import refuse_applied
from lightning_pmss.layers.products import compute_dtype
from lightning_pmss.layers.weight_noise import NoiseProduct, merged_row_norms, seed_of


class FlatLoRA(Callback):
    """Flat-LoRA (arXiv 2409.14396): each optimizer step is computed with Gaussian noise on the merged weights ``W + delta``.

    The entries of row i get the standard deviation ``factor sigma / sqrt(in) |W'_i|``, and ``factor`` grows over the optimizer
    steps from 0 to 1 as ``(1 - cos(pi step / steps)) / 2``. One draw is used for a whole optimizer step: in all batches that it
    accumulates, and in both passes. Works with every method, on the layers that `AdapterCallback` converted.

    The published code adds the noise to W and subtracts it afterwards, which changes a bfloat16 W step by step. Here the layer
    computes a second product, with the noise alone (`lightning_pmss.layers.weight_noise`): W stays bit-identical, also where it
    is quantised. The draws depend on `seed`, the step and the layer's name, so that a resumed run continues with the same ones;
    the global random state is neither read nor changed. Validation, checkpoints and what is saved never see noise.

    Args:
        sigma: Strength at the end of the training. Published: 0.05 for language models, 0.15 for CLIP.
        seed: Of the draws.
        same_on_ranks: Draw the same noise on all ranks; otherwise each rank has draws of its own, and the gradient is a mean
            over them. The published code runs on one device.

    Raises:
        ValueError: `sigma` is not a positive number; nothing was converted; the number of optimizer steps is not known.

    Example:
        >>> import lightning as L
        >>> from lightning_pmss import PMSSCallback
        >>> from lightning_pmss.callbacks import FlatLoRA
        >>> trainer = L.Trainer(callbacks=[PMSSCallback(rank=64), FlatLoRA(sigma=0.05)])
    """

    def __init__(self, sigma: float = 0.05, seed: int = 0, same_on_ranks: bool = False) -> None:
        super().__init__()
        if not (math.isfinite(sigma) and sigma > 0):
            raise ValueError(f"FlatLoRA: sigma={sigma!r} must be a positive number, such as 0.05.")
        self.sigma, self.seed, self.same_on_ranks = sigma, seed, same_on_ranks
        self._noise = StepNoise()
        self._handles: list[Any] = []
        self._steps = 1

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        layers = adapted_layers(pl_module)
        if not layers:
            raise ValueError(
                "FlatLoRA: no layer of the model is converted, so no merged weight can get noise. Add AdapterCallback(...)"
                " or PMSSCallback(...) to the Trainer's callbacks."
            )
        refuse_experts(layers, "FlatLoRA gives no noise to", "leave FlatLoRA out")
        refuse_applied(layers, "FlatLoRA gives no noise to", "leave FlatLoRA out")
        if found := next((name for name, layer in layers.items() if isinstance(layer, MatrixLinear)), None):
            raise ValueError(
                f"FlatLoRA gives no noise to parameters of other modules, such as `{found}`. Take it out of target_parameters,"
                " or leave FlatLoRA out."
            )
        for name, layer in layers.items():
            self._handles += self._noise.disturb(layer, name)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not math.isfinite(trainer.estimated_stepping_batches):
            raise ValueError(
                "FlatLoRA: the number of optimizer steps is not known, over which the noise grows. Set max_steps, or max_epochs"
                " and a loader with a length."
            )
        self._steps = max(1, int(trainer.estimated_stepping_batches))

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        factor = 0.5 * (1 - math.cos(math.pi * min(1.0, step / self._steps)))
        rank = 0 if self.same_on_ranks else trainer.global_rank
        self._noise.begin(self.sigma * factor, (self.seed, step, rank))

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._noise.end()

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._noise.end()

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._remove()

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._remove()

    def _remove(self) -> None:
        self._noise.end()
        for handle in self._handles:
            handle.remove()
        self._handles = []


class StepNoise:
    """The noise of the running optimizer step."""

    def __init__(self) -> None:
        self.strength = 0.0  # of now: sigma times the factor; 0 outside of training batches
        self.words: tuple[int, ...] = ()
        self.norms: dict[str, Tensor] = {}  # of the rows of W', as they were when the step began

    def disturb(self, layer: AdaptedLinear, name: str) -> list[Any]:
        """Let the layer compute with noise while a batch runs; returns handles that end it."""

        # Plain functions: a copy of the model shares them, and copies nothing of the callback.
        def before(layer: Any, args: tuple[Tensor, ...]) -> None:
            self.measure(layer, name)

        def after(layer: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return self.added(name, args[0], output)

        # ZeRO-3 takes W back as soon as the layer's forward ends, so what needs W stands before it.
        return [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]

    def begin(self, strength: float, words: tuple[int, ...]) -> None:
        """A batch begins; with other words than the last one's, a step."""
        if words != self.words:
            self.words, self.norms = words, {}
        self.strength = strength

    def end(self) -> None:
        """The batch has ended."""
        self.strength = 0.0

    # Noise from a generator cannot be compiled; a compiled model leaves its graph here.
    @torch.compiler.disable
    def measure(self, layer: AdaptedLinear, name: str) -> None:
        """Norms of the rows of W', once a step."""
        if self.strength != 0.0 and name not in self.norms:
            self.norms[name] = merged_row_norms(layer)

    @torch.compiler.disable
    def added(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """y and ``N x``."""
        if self.strength == 0.0:
            return y
        std = self.norms[name] * (self.strength / math.sqrt(x.shape[-1]))
        flat = x.reshape(-1, x.shape[-1]).to(compute_dtype(x))
        noise: Tensor = NoiseProduct.apply(flat, std, seed_of(*self.words, name))
        return y + noise.view(*x.shape[:-1], len(std)).to(y.dtype)
