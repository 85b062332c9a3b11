"""Modules that configurations of the tests name: what is in them goes wrong, or must never be called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn

from lightning_pmss.modules import CausalLMModule


class Refusing(BoringModel):
    """Refuses a value in ``setup``."""

    def setup(self, stage: str) -> None:
        raise ValueError("this module wants another folder")


class Unpacking(BoringModel):
    """Has a bug that is a ValueError."""

    def setup(self, stage: str) -> None:
        self.one, self.two = [1, 2, 3]


class Stepping(BoringModel):
    """Fails in a step, which may be hours after the start."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise ValueError("in the step")


class Missing(BoringModel):
    """Has a bug of another kind."""

    def setup(self, stage: str) -> None:
        raise KeyError("a mistake")


class Derived(CausalLMModule):
    """Takes what the class above it takes."""

    def __init__(self, own: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)


def trap(*args: Any, **kwargs: Any) -> Any:
    """Leaves a mark if it is called."""
    Path("called").touch()
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)


def annotated(params: Any, lr: float = 1.0) -> torch.optim.Optimizer:
    """A function that says it makes an optimizer."""
    return trap()


class Trap(nn.Module):
    """A class that is no optimizer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        trap()


class Marked(L.Callback):
    """A callback that may be named."""


class Holding(torch.optim.SGD):
    """An optimizer with an argument of any type."""

    def __init__(self, params: Any, lr: float = 1.0, inner=None) -> None:  # type: ignore[no-untyped-def]
        super().__init__(params, lr=lr)
