"""Each pass of SAM and BSAM has the gradient of the whole window's token mean: in float64, against plain transformers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from test_token_weighted import ROWS, WINDOWS, batches, still
from token_windows import gradient_alone
from torch import Tensor

from lightning_pmss.callbacks import SharpnessPasses
from lightning_pmss.modules import CausalLMModule
from lightning_pmss.optimizers import BSAM, SAM


class Final(L.Callback):
    """The gradient of each step, as the hook before it sees it."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(pl_module.step_part))

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.steps.append({n: p.grad.clone() for n, p in pl_module.model.named_parameters() if p.grad is not None})


def alone(folder: str, window: list[int], both: bool) -> dict[str, Tensor]:
    rows = [ROWS[i] for i in window]
    g = gradient_alone(folder, rows)
    unit = 1 / _norm(g)
    upper = gradient_alone(folder, rows, {name: 0.1 * unit * value for name, value in g.items()})
    if not both:
        return upper
    lower = gradient_alone(folder, rows, {name: -0.2 * unit * value for name, value in g.items()})
    factor = _norm(upper) / _norm(lower)
    return {name: upper[name] + g[name] - factor * lower[name] for name in g}


def _norm(values: dict[str, Tensor]) -> Tensor:
    return torch.stack([value.norm() for value in values.values()]).norm()


@pytest.mark.parametrize("both", [False, True], ids=["sam", "bsam"])
@pytest.mark.parametrize("options", [{"accumulate_grad_batches": 3}, {}], ids=["windows", "large batches"])
def test_every_pass_covers_the_window(
    tiny_gpt2: str, trainer: Callable[..., L.Trainer], both: bool, options: dict[str, int]
) -> None:
    make: Any = functools.partial(BSAM, rho_max=0.1, rho_min=0.2) if both else functools.partial(SAM, rho=0.1)
    seen, plain = Final(), Final()
    for callback, optimizer in ((plain, still), (seen, lambda params: make(params, still))):
        model = CausalLMModule(tiny_gpt2, optimizer=optimizer, lr_schedule="constant", warmup_ratio=0.0, generate_in=[])
        run = trainer(callbacks=[callback, SharpnessPasses()], precision="64-true", **options)
        run.fit(model, batches() if options else batches(batch_size=3))
    assert seen.losses == plain.losses  # those of the first pass
    assert run.global_step == len(seen.steps) == len(WINDOWS)
    for found, window in zip(seen.steps, WINDOWS, strict=True):
        expected = alone(tiny_gpt2, window, both)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert float((found[name] - value).norm()) <= 1e-9 * float(value.norm()), name
