"""SAM and BSAM with adapters on fused experts, of which some get no token in some passes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_pmss import convert
from lightning_pmss.conversion.convert import adapted_layers
from lightning_pmss.optimizers import BSAM, SAM
from tests.experts.toys import mixture, train
from tests.experts.training import Mixture, batches, fit
from tests.methods.cases import CASES

SGD = functools.partial(torch.optim.SGD, lr=0.05)
METHODS = ["lora", "pmss", "pmss columns=all", "miss", "bat"]
IDS = torch.randint(0, 64, (1, 2), generator=torch.Generator().manual_seed(3))  # two tokens, 16 experts


class Sharp(Mixture):
    """In float64, with BSAM."""

    def __init__(self) -> None:
        super().__init__("qwen3_moe", dtype=torch.float64, num_experts=8)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return BSAM([p for p in self.parameters() if p.requires_grad], SGD, rho_max=0.1, rho_min=0.1)


@pytest.mark.parametrize("method", METHODS)
def test_a_window_equals_its_large_batch(method: str, tmp_path: Path) -> None:
    """A batch of the window leaves experts idle to which the others give tokens."""
    whole, parts = Sharp(), Sharp()
    config = CASES[method](rank=4, target_modules=[], target_parameters=["gate_up_proj", "down_proj"])
    fit(tmp_path / "whole", whole, config, loader=batches(8, 4, 2), max_steps=4)
    fit(tmp_path / "parts", parts, config, loader=batches(16, 4, 1), max_steps=4, accumulate_grad_batches=2)
    for found, expected in zip(trained(parts), trained(whole), strict=True):
        assert float(expected.detach().abs().max()) > 0
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-11)


@pytest.mark.parametrize("method", METHODS)
def test_sam_equals_two_gradients_by_hand(method: str) -> None:
    model, other = (converted(method) for _ in range(2))
    closure = loss_of(model)
    optimizer = SAM(trained(model), SGD, rho=0.2)
    optimizer.step(lambda: (optimizer.zero_grad(), closure())[1])

    own = trained(other)
    start = [p.detach().clone() for p in own]
    loss_of(other)()
    first = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in own]
    assert any((gradient.flatten(1) == 0).all(1).any() for gradient in first)  # some expert is idle
    norm = torch.stack([gradient.norm() for gradient in first]).norm()
    with torch.no_grad():
        for p, gradient in zip(own, first, strict=True):
            p += 0.2 * gradient / norm
            p.grad = None
    loss_of(other)()
    for p, begin, q in zip(own, start, trained(model), strict=True):
        expected = begin - 0.05 * p.grad if p.grad is not None else begin
        torch.testing.assert_close(q.detach(), expected, rtol=1e-9, atol=1e-13)


def converted(method: str) -> torch.nn.Module:
    model = mixture("qwen3_moe", torch.float64, num_experts=16).train()
    convert(model, CASES[method](rank=4, target_modules=[], target_parameters=["gate_up_proj", "down_proj"]))
    return train(model, size=0.02)  # type: ignore[no-any-return]


def loss_of(model: torch.nn.Module) -> Callable[[], Tensor]:
    def loss() -> Tensor:
        found: Tensor = model(IDS, labels=IDS).loss
        found.backward()
        return found

    return loss


def trained(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    assert adapted_layers(model)
    return [p for p in model.parameters() if p.requires_grad]
