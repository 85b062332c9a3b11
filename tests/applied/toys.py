"""Small convolutions and embeddings, and networks of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pmss import AdapterConfig
from lightning_pmss.conversion.convert import adapted_layers
from tests.methods.cases import CASES

IDS = torch.tensor([[1, 5, 5, 0], [22, 7, 1, 3]])
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv2d": (lambda: nn.Conv2d(6, 8, 3), (2, 6, 7, 6)),
    "conv2d strided": (lambda: nn.Conv2d(6, 8, (3, 2), stride=2, padding=(1, 2), dilation=(2, 1), bias=False), (2, 6, 7, 6)),
    "conv2d reflecting": (lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"), (2, 6, 7, 6)),
    "conv2d same": (lambda: nn.Conv2d(6, 8, (4, 3), padding="same"), (2, 6, 7, 6)),
    "conv2d 1x1": (lambda: nn.Conv2d(6, 8, 1), (2, 6, 3, 4)),
    "conv2d of one image": (lambda: nn.Conv2d(6, 8, 3), (6, 7, 6)),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, stride=2, padding=1), (2, 6, 9)),
    "conv1d circular": (lambda: nn.Conv1d(6, 8, 3, padding=2, padding_mode="circular"), (2, 6, 9)),
    "conv3d": (lambda: nn.Conv3d(3, 8, 2, padding=1), (1, 3, 3, 4, 3)),
    "embedding": (lambda: nn.Embedding(23, 8), ()),
    "embedding padding": (lambda: nn.Embedding(23, 8, padding_idx=1, sparse=True), ()),
}  # fmt: skip


def can(method: str, kind: str) -> bool:
    """Whether a method has embeddings."""
    return not (method.startswith("bat") and "embedding" in kind)


PAIRS = [(method, kind) for method in CASES for kind in LAYERS if can(method, kind)]


def one(kind: str, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """A network of one layer."""
    torch.manual_seed(3)
    return nn.Sequential(LAYERS[kind][0]()).to(dtype)


def inputs(kind: str, dtype: torch.dtype = torch.float64) -> Tensor:
    """For that layer; numbers want a gradient."""
    shape = LAYERS[kind][1]
    if not shape:
        return IDS
    x = torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return x.to(dtype).requires_grad_()


def config_of(method: str, *targets: str, **options: Any) -> AdapterConfig:
    return CASES[method](**{"target_modules": list(targets) or ["0"], "rank": 4} | options)


class Net(nn.Module):
    """An embedding, convolutions of both kinds and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(23, 8, padding_idx=1)
        self.along = nn.Conv1d(8, 16, 3, padding=1)
        self.image = nn.Conv2d(1, 8, 3, stride=2)
        self.head = nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        words = torch.relu(self.along(self.embed(ids).transpose(1, 2)))
        answer: Tensor = self.head(self.image(words[:, None]).mean((2, 3)))
        return answer


TARGETS = ("embed", "along", "image", "head")


def targets(method: str) -> list[str]:
    """Those of `Net` that a method converts."""
    return [name for name in TARGETS if can(method, "embedding" if name == "embed" else name)]


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def train(model: nn.Module, seed: int = 1, size: float = 0.3) -> Any:
    """Give each layer an update of about `size` times its weight."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            for tensor in layer.core.trained().values():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) / math.sqrt(tensor.shape[-1]))
            weight = layer.base_weight().double()
            for _ in range(60):
                norm = layer.update().delta(weight, dtype=torch.float64).norm() / weight.norm()
                if size / 2 < norm < 2 * size:
                    break
                for tensor in layer.core.trained().values():
                    tensor.mul_(1.3 if norm < size else 0.7)
            assert norm > 1e-3
    return model
