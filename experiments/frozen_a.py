"""Controls: LoRA whose A is frozen, so that B alone is trained as in the one-sided form, with other directions in A.

``random``: orthonormal ones (LoRA-FA, arXiv 2308.03303, and arXiv 2402.16842, with rows of equal length). ``inputs``: entries
of the input, drawn at random (PaCA, arXiv 2503.01905). ``eigen``: the leading eigenvectors of the inputs' second moments over
a few batches (the directions of EVA, arXiv 2410.07170, at one rank for all layers). ``sums``: sums of every r-th entry of the
input (MiSS, arXiv 2409.15371). ``outputs``: the same sums of the base's output, ``S W``, made orthonormal.
"""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

DIRECTIONS = ("random", "inputs", "eigen", "sums", "outputs")


class FrozenA(Callback):
    """Wraps the model in peft's LoRA with ``y' = y + scale B (A x)``, A ``[rank, in]`` frozen with orthonormal rows."""

    def __init__(
        self,
        rank: int,
        target_modules: Any,
        directions: str,
        calibration: Any,
        *,
        seed: int,
        scale: float,
        batches: int,
    ) -> None:
        if directions not in DIRECTIONS:
            raise ValueError(f"directions={directions!r} is not known; choose one of {list(DIRECTIONS)}.")
        self.rank, self.target_modules, self.directions, self.seed = rank, target_modules, directions, seed
        self.calibration, self.scale, self.batches = calibration, scale, batches

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        import peft

        if getattr(pl_module, "model", None) is None:
            pl_module.configure_model()
        if isinstance(pl_module.model, peft.PeftModel):
            return
        config = peft.LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=self.target_modules)
        pl_module.model = peft.get_peft_model(pl_module.model, config)  # type: ignore[arg-type, assignment]
        adapted: dict[str, Any] = {n: m for n, m in pl_module.model.named_modules() if hasattr(m, "lora_A")}
        layers: dict[str, Any] = {n: m.lora_A["default"] for n, m in adapted.items()}
        moments = self._moments(pl_module, layers) if self.directions == "eigen" else {}
        generator = torch.Generator().manual_seed(self.seed)
        for name, a in layers.items():
            scale = math.sqrt(a.in_features / self.rank) if self.scale == "in" else self.scale
            rows = self._rows(adapted[name].weight.detach().float(), moments.get(name), generator)
            a.weight.data.copy_(scale * rows)
            a.weight.requires_grad_(False)

    def _rows(self, weight: Tensor, moment: Tensor | None, generator: torch.Generator) -> Tensor:
        out, size = weight.shape
        if moment is not None:
            return torch.linalg.eigh(moment.double()).eigenvectors[:, -self.rank :].T
        if self.directions == "sums":
            return F.normalize(_tiles(self.rank, size))
        if self.directions == "outputs":
            return torch.linalg.qr((_tiles(self.rank, out) @ weight).T)[0].T
        if self.directions == "inputs":
            return torch.eye(size)[torch.randperm(size, generator=generator)[: self.rank]]
        return torch.linalg.qr(torch.randn(size, self.rank, generator=generator))[0].T

    @torch.no_grad()
    def _moments(self, module: Any, layers: dict[str, nn.Module]) -> dict[str, Tensor]:
        """``E[x x^T]`` of the inputs of each A."""
        found: dict[str, Tensor] = {}

        def gather(name: str) -> Any:
            def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                x = inputs[0].flatten(0, -2).float()
                found[name] = found.get(name, torch.zeros(())) + x.T @ x

            return hook

        handles = [layer.register_forward_pre_hook(gather(name)) for name, layer in layers.items()]
        for batch in self.calibration()[: self.batches]:
            module.response_loss(batch)
        for handle in handles:
            handle.remove()
        return found


def _tiles(rank: int, size: int) -> Tensor:
    """Identities beside each other, ``[rank, size]``."""
    return torch.eye(rank).repeat(1, -(-size // rank))[:, :size]
