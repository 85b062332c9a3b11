"""HUT, as reconstructed: the formula entry by entry, ranks that divide, and the diagonal form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_pmss import HUTConfig, convert, save_adapter
from lightning_pmss.conversion.convert import adapted_layers
from lightning_pmss.methods.hut import HUTUpdate
from lightning_pmss.named import combine_adapters, load_adapters, set_adapter
from tests.methods.dense import TARGETS, is_dense, layers, trained


def entry_by_entry(weight: Tensor, core: Any) -> Tensor:
    left, right = core.left, core.right
    rank = right.shape[1]
    rows = [
        torch.stack([weight[i, j] * (1 + left[i, j % rank]) * (1 + right[j, i % rank]) for j in range(weight.shape[1])])
        for i in range(weight.shape[0])
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5, 6])
def test_the_tiled_layer_is_the_formula(rank: int) -> None:
    is_dense(HUTConfig(target_modules=TARGETS, rank=rank), entry_by_entry)


def test_the_diagonal_layer_is_the_formula_and_tiled_of_rank_1() -> None:
    config = HUTConfig(target_modules=TARGETS, form="diagonal", rank=5)  # of which the rank does not matter
    is_dense(config, lambda weight, core: (1 + core.left) * weight * (1 + core.right.T))
    is_dense(config, entry_by_entry)


@pytest.mark.parametrize("form", ["tiled", "diagonal"])
def test_the_first_step_trains_everything(form: str) -> None:
    model = layers()
    convert(model, HUTConfig(target_modules=TARGETS, rank=3, form=form))
    model(torch.randn(4, 12, dtype=torch.float64)).square().sum().backward()
    for layer in adapted_layers(model).values():
        for tensor in layer.core.trained().values():
            assert not tensor.any()
            assert tensor.grad is not None
            assert bool(tensor.grad.ne(0).all())


def test_a_file_of_another_shape_is_refused() -> None:
    assert HUTUpdate.why_not((18, 12), {"left": torch.zeros(18, 5), "right": torch.zeros(12, 5)}) is None
    message = "left is torch.float32 [18, 4]; it must be float32 or float64 [18, 5]"
    assert HUTUpdate.why_not((18, 12), {"left": torch.zeros(18, 4), "right": torch.zeros(12, 5)}) == message
    wide = {"left": torch.zeros(18, 13), "right": torch.zeros(12, 13)}
    assert HUTUpdate.why_not((18, 12), wide) == "right has 13 columns. W is [18, 12]"


def test_several_adapters(tmp_path: Path) -> None:
    x = torch.randn(3, 12, generator=torch.Generator().manual_seed(1))
    expected = {}
    for rank in (2, 3, 6):
        model = nn.Sequential(layers(torch.float32)[0])
        trained(model, HUTConfig(target_modules=["0"], rank=rank))
        save_adapter(model, tmp_path / str(rank))
        expected[str(rank)] = model(x)
    model = nn.Sequential(layers(torch.float32)[0])
    load_adapters(model, {name: tmp_path / name for name in expected})
    for name in ("3", "2", "6", "2"):
        set_adapter(model, name)
        torch.testing.assert_close(model(x), expected[name], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="the sum of HUT adapters is no HUT adapter"):
        combine_adapters(model, "sum", {"2": 0.5, "3": 0.5})
