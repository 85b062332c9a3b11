"""TokenMean against hand computation."""

from __future__ import annotations

import torch
from torch import nn

from lightning_pmss.modules.token_mean import TokenMean


def test_batches_count_by_their_tokens() -> None:
    metric = TokenMean()
    for mean, tokens in ((1.0, 10), (4.0, 2), (0.0, 0)):
        metric.update(torch.tensor(mean), torch.tensor(tokens))
    torch.testing.assert_close(metric.compute(), torch.tensor(18 / 12))


def test_nan_shows_and_so_does_a_split_without_tokens() -> None:
    metric = TokenMean()
    assert metric.compute().isnan()
    metric.update(torch.tensor(1.0), torch.tensor(3))
    metric.update(torch.tensor(float("nan")), torch.tensor(3))
    assert metric.compute().isnan()
    metric.reset()
    metric.update(torch.tensor(1.0), torch.tensor(3))
    assert metric.compute() == 1


def test_a_cast_module_still_sums_in_float32() -> None:
    module = nn.ModuleDict({"val": TokenMean()}).to(dtype=torch.bfloat16)
    metric = module["val"]
    for _ in range(2):  # the second time after a reset
        for _ in range(1000):
            metric.update(torch.tensor(1.001), torch.tensor(1))
        assert metric.compute().dtype == torch.float32
        torch.testing.assert_close(metric.compute(), torch.tensor(1.001))
        metric.reset()
