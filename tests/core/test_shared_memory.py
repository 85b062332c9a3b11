"""Weights that share memory although they are Parameters of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_pmss import PMSSConfig, convert, merged

_BIG = torch.randn(24, 24, generator=torch.Generator().manual_seed(0))
SHARING = {
    "the same data": (_BIG[:8, :8], _BIG[:8, :8]),
    "a transpose": (_BIG[:8, :8], _BIG[:8, :8].T),
    "rows in common": (_BIG[4:12, :8], _BIG[:8, :8]),
    "columns in common": (_BIG[:8, :8], _BIG[:8, 4:12]),
    "a corner": (_BIG[7:15, 7:15], _BIG[:8, :8]),
    "below to the left": (_BIG[:8, 12:20], _BIG[1:9, 6:14]),
    "a flat buffer": (_BIG.view(-1)[:64].view(8, 8), _BIG.view(-1)[32:96].view(8, 8)),
    "two tensors of one array": tuple(torch.from_numpy(_BIG[:8, :8].numpy()) for _ in range(2)),
}
APART = {
    "halves": torch.randn(16, 8, generator=torch.Generator().manual_seed(0)).chunk(2),
    "columns apart": (_BIG[:8, :8], _BIG[:8, 8:16]),
    "rows apart": (_BIG[8:16, :8], _BIG[:8, :8]),
    "a diagonal": (_BIG[:8, :8], _BIG[8:16, 8:16]),
    "below to the left": (_BIG[:8, 16:24], _BIG[1:9, :8]),
}


def _two(weights: Any) -> nn.Sequential:
    net = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Embedding(8, 8))
    for layer, weight in zip(net, weights, strict=False):
        layer.weight = nn.Parameter(weight)
    return net


@pytest.mark.parametrize("case", SHARING)
def test_weights_that_share_memory_are_refused(case: str) -> None:
    weights = SHARING[case]
    net = _two(weights)
    for targets in (["0", "1"], ["1"], "all-linear"):
        with pytest.raises(
            ValueError, match="`[01]` shares the memory of its weight with `[01].weight`: .*exclude it, or give"
        ):
            convert(net, PMSSConfig(target_modules=targets, rank=2))
    assert type(net[0]) is type(net[1]) is nn.Linear
    embedded = _two((torch.randn(8, 8), weights[0]))
    embedded[2].weight = nn.Parameter(weights[1])  # memory of another kind of module, and of a buffer
    with pytest.raises(ValueError, match="`1` shares the memory of its weight with `2.weight`"):
        convert(embedded, PMSSConfig(target_modules=["1"], rank=2))
    buffered = _two((torch.randn(8, 8), weights[0]))
    buffered[2].register_buffer("table", weights[1])
    with pytest.raises(ValueError, match="`1` shares the memory of its weight with `2.table`"):
        convert(buffered, PMSSConfig(target_modules=["1"], rank=2))
    with torch.no_grad():
        net[0].weight = nn.Parameter(net[0].weight.detach().clone())  # the remedy
    convert(net, PMSSConfig(target_modules=["0", "1"], rank=2))


@pytest.mark.parametrize("case", APART)
def test_slices_that_share_no_element_are_converted_and_merged_right(case: str) -> None:
    net = _two(APART[case])
    before = [layer.weight.detach().clone() for layer in net[:2]]
    convert(net, PMSSConfig(target_modules=["0", "1"], rank=4))
    exact = []
    for layer in net[:2]:
        nn.init.normal_(layer.core.weight)
        w = layer.weight.detach().double()
        exact.append(w + w[:, layer.cols] @ layer.core_update().detach().double() @ w[layer.rows])
    with merged(net):
        for layer, weight in zip(net[:2], exact, strict=True):
            torch.testing.assert_close(layer.weight.double(), weight, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(net[:2], before, strict=True))


def test_an_expanded_weight_is_refused() -> None:
    net = _two((torch.randn(1, 8).expand(8, 8), torch.randn(8, 8)))
    with pytest.raises(ValueError, match="`0` has a weight that is expanded from fewer numbers"):
        convert(net, PMSSConfig(rank=2))
