"""Small models with matrices in parameters of modules that are no linear layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pmss.conversion.convert import adapted_layers
from lightning_pmss.layers.layout import Layout
from tests.experts.toys import mixture, tokens

D = 16


class Attention(nn.Module):
    """Self-attention with one parameter for queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True)
        self.head = nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.attention(x, x, x, need_weights=False)[0])
        return y


class Cross(nn.Module):
    """Attention whose queries, keys and values have other sizes, with a parameter each."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 2, kdim=6, vdim=10, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attention(x, x[..., :6], x[..., :10])[0]
        return y


class Encoder(nn.Module):
    """torch's encoder, which reads weights of its layers directly where nobody asks for gradients."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(D, 2, 24, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor) -> Tensor:
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        padding[0, -2:] = True
        y: Tensor = self.encoder(x, src_key_padding_mask=padding)
        return y[:, :-2]


class Recurrent(nn.Module):
    """An LSTM, which has its parameters in a list, too."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(D, 12, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.lstm(x)[0]
        return y


class Twice(nn.Module):
    """A matrix in two products, once transposed, and one of which a part is used."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.table = nn.Parameter(torch.randn(24, D) * 0.3), nn.Parameter(torch.randn(8, 12) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.w.T) @ self.w + (x[..., :8] @ self.table[:, :4]).sum(-1, keepdim=True)


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = Twice()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.part(x)
        return y


class Routed(nn.Module):
    """A mixture of transformers; every token asks every expert, so that a change of the router changes no choice."""

    def __init__(self, name: str) -> None:
        super().__init__()
        experts = {"qwen3_moe": "num_experts", "deepseek": "n_routed_experts"}.get(name, "num_local_experts")
        self.model = mixture(name, experts_implementation="eager", **{"num_experts_per_tok": 8, experts: 8})

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.model(inputs_embeds=torch.cat([x, x], -1)).logits
        return y


@dataclass(frozen=True)
class Toy:
    """A model, what ``target_parameters`` says, and the names of the parameters."""

    make: Callable[[], nn.Module]
    patterns: Any
    names: tuple[str, ...]


_LAYERS = ("encoder.layers.0.self_attn.in_proj_weight", "encoder.layers.1.self_attn.in_proj_weight")
TOYS = {
    "attention": Toy(Attention, ["in_proj_weight"], ("attention.in_proj_weight",)),
    "cross": Toy(Cross, r".*\.[qkv]_proj_weight", tuple(f"attention.{k}_proj_weight" for k in "qkv")),
    "encoder": Toy(Encoder, ["in_proj_weight"], _LAYERS),
    "lstm": Toy(Recurrent, r".*lstm\.weight_.*", tuple(f"lstm.weight_{k}_l{i}" for i in (0, 1) for k in ("ih", "hh"))),
    "twice": Toy(Own, ["part.w", "table"], ("part.w", "part.table")),
    **{
        name: Toy(lambda name=name: Routed(name), [f"{key}.weight"], (f"model.layers.1.mlp.{key}.weight",))  # type: ignore[misc]
        for name, key in (("mixtral", "gate"), ("qwen3_moe", "gate"), ("gpt_oss", "router"), ("deepseek", "gate"))
    },
}


def made(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """A model, the same at each call."""
    torch.manual_seed(seed)
    return TOYS[name].make().to(dtype)


def inputs(dtype: torch.dtype = torch.float64) -> Tensor:
    """``[3, 7, D]``."""
    return torch.randn(3, 7, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def matrices(model: nn.Module) -> dict[str, Any]:
    """The converted parameters, without other layers."""
    return {n: x for n, x in adapted_layers(model).items() if x.layout is Layout.PARAMETER}


__all__ = ["D", "TOYS", "Toy", "inputs", "made", "matrices", "tokens"]
