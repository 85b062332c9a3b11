"""The trained core stays in full precision under autocast, and autocast's cache cannot freeze it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_pmss import PMSSConfig, convert
from lightning_pmss.methods.pmss.config import COORDINATES


@pytest.mark.parametrize("coordinates", COORDINATES)
def test_u_is_formed_in_full_precision_under_autocast(coordinates: str) -> None:
    model = nn.Sequential(nn.Linear(32, 32))
    convert(model, PMSSConfig(rank=8, coordinates=coordinates))
    with torch.no_grad():
        model[0].core.weight.normal_()
    exact = model[0].core_update()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model[0].core_update(), exact)


@pytest.mark.parametrize("coordinates", COORDINATES)
def test_one_autocast_context_around_many_steps(coordinates: str) -> None:
    """Autocast caches the casts of leaf parameters until its context ends: a cached U would never seem to change."""
    model = nn.Sequential(nn.Linear(32, 32))
    convert(model, PMSSConfig(rank=8, coordinates=coordinates))
    x = torch.randn(16, 32)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            before = model(x)
        model(x).square().sum().backward()
        with torch.no_grad():
            scale = model[0].core.weight.grad.abs().max()
            model[0].core.weight.sub_(model[0].core.weight.grad / scale)
            after = model(x)
        model[0].core.weight.grad = None
        model(x).square().sum().backward()
    assert not torch.equal(before, after)
    assert model[0].core.weight.grad is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x), after)
