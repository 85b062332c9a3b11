"""The optimisers of the studies, by name."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_pmss.optimizers import BSAM, SAM


class TensorAdam(torch.optim.Optimizer):
    """Adam with one second moment for a whole tensor: a step goes along the gradient's running mean.

    Adam proper moves every entry by about the rate, those whose gradient is mostly noise too. After Adam-mini
    (arXiv 2406.16793), which keeps one second moment for each block that the Hessian suggests.

    Args:
        params: Parameters or groups.
        lr: Root mean square of a step's entries where gradients agree.
        betas: Of the running means.
        eps: Added to the root of the second moment.
        weight_decay: Must be 0; here so that all optimisers are called alike.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if weight_decay:
            raise ValueError(f"weight_decay={weight_decay} is not offered by TensorAdam; leave it 0.")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @override
    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        """One step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            one, two = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state: dict[str, Any] = self.state[p]
                if not state:
                    state |= {"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": p.new_zeros(())}
                mean: Tensor = state["exp_avg"]
                state["step"] += 1
                mean.lerp_(p.grad, 1 - one)
                state["exp_avg_sq"].lerp_(p.grad.square().mean(), 1 - two)
                size = (state["exp_avg_sq"] / (1 - two ** state["step"])).sqrt() + group["eps"]
                p.sub_(mean / size * (group["lr"] / (1 - one ** state["step"])))
        return loss


def _around(wrapper: Callable[..., torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    """AdamW, whose gradients a wrapper finds in several passes."""

    def make(params: Iterable[Any], **options: Any) -> torch.optim.Optimizer:
        return wrapper(params, functools.partial(torch.optim.AdamW, **options))

    return make


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    # A rate then moves a matrix about as far as AdamW's would.
    "muon": functools.partial(torch.optim.Muon, adjust_lr_fn="match_rms_adamw"),
    "tensor-adam": TensorAdam,
    "sam": _around(SAM),
    "bsam": _around(BSAM),
}
