"""What a refusal must leave as it was, and how a test sums up its cases."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of everything that a model holds, and of which parameters it trains."""
    values = {key: value.detach().clone() for key, value in model.state_dict().items()}
    return values | {f"{n}?": torch.tensor(p.requires_grad) for n, p in model.named_parameters()}


def assert_unchanged(model: nn.Module, before: dict[str, torch.Tensor], told: str) -> None:
    """A refusal leaves a model as it was."""
    now = state_of(model)
    changed = [key for key in set(now) | set(before) if key not in now or key not in before]
    changed += [key for key in set(now) & set(before) if not torch.equal(now[key], before[key])]
    if changed:
        pytest.fail(f"{told}: refused, and changed {sorted(changed)[:5]}")


def summary(found: Counter[str]) -> None:
    """Show what came of the cases (``pytest -rP`` or ``-s``), and make sure that the damage was one."""
    print(dict(found))
    if sum(found.values()) >= 20:
        assert found["refused by all"] > sum(found.values()) / 3
