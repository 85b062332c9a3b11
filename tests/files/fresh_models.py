"""Converted models with trained tensors, and the comparison of their logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_pmss import PMSSConfig, convert

IDS = torch.arange(1, 12)[None]


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(ids).logits
    return found


def trained(model: Any, **options: Any) -> Any:
    convert(model, PMSSConfig(rank=4, **options))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=1.0 if ".core." in name else 0.1)
    return model


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
