"""The mean loss of a split over its tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override


class TokenMean(Metric):
    """Mean of batch means, each weighted by its number of tokens; summed over processes.

    torchmetrics' ``MeanMetric`` does not serve: it drops NaN with a warning, and with ``nan_strategy="disable"`` (release
    1.9.0) it ignores the weights.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    total: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", default=torch.tensor(0.0, dtype=torch.float32), dist_reduce_fx="sum")
        self.add_state("tokens", default=torch.tensor(0), dist_reduce_fx="sum")

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> TokenMean:
        # `bf16-true` casts whole modules. In bfloat16 a sum stops growing after some 256 batches.
        kept = self.total, self._defaults["total"]
        super()._apply(fn, exclude_state)
        device = self.total.device
        self.total, self._defaults["total"] = (value.to(device) for value in kept)  # type: ignore[union-attr]
        return self

    @override
    def update(self, mean: Tensor, tokens: Tensor) -> None:
        """Add a batch: its mean (scalar) over `tokens` (int64 scalar)."""
        self.total += mean.float() * tokens
        self.tokens += tokens

    @override
    def compute(self) -> Tensor:
        """The mean over all tokens, a float32 scalar; NaN if there was none."""
        return self.total / self.tokens
