"""Rows and columns as tensors that no walk over parameters and buffers finds."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from dense import pmss_layer, random_like
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_pmss.layers.indices import index_tensors


def indices(layer: Any) -> list[Tensor]:
    return [layer.rows.clone(), layer.cols.clone()]


def same(layer: Any, before: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(indices(layer), before, strict=True))


def test_only_the_state_dict_has_them() -> None:
    model = nn.Sequential(pmss_layer(), nn.GELU())
    assert {"0.rows", "0.cols"} <= set(model.state_dict())
    assert set(index_tensors(model)) == {"0.rows", "0.cols"}
    assert index_tensors(model)["0.rows"] is model[0].rows
    walked = [*model.parameters(), *model.buffers()]
    assert all(t.is_floating_point() for t in walked)


@pytest.mark.parametrize("use_buffers", [True, False])
def test_an_average_of_models_averages_v_alone(use_buffers: bool) -> None:
    model = nn.Sequential(pmss_layer(out=14, inp=12, dtype=torch.float32))
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=use_buffers)
    before, expected = indices(model[0]), None
    for step in range(5):
        with torch.no_grad():
            model[0].core.weight.copy_(random_like(4, 4, dtype=torch.float32) * (step + 1))
        v = model[0].core.weight.detach()
        expected = v.clone() if expected is None else 0.9 * expected + 0.1 * v
        averaged.update_parameters(model)
    assert same(averaged.module[0], before)
    torch.testing.assert_close(averaged.module[0].core.weight, expected)
    assert averaged.module[0].rows is not model[0].rows


@pytest.mark.parametrize("cast", ["half", "bfloat16", "type", "to"])
def test_a_cast_leaves_them(cast: str) -> None:
    layer = pmss_layer(dtype=torch.float32)
    before = indices(layer)
    x = random_like(3, 10, dtype=torch.float32)
    expected = layer(x)
    {"half": layer.half, "bfloat16": layer.bfloat16}.get(cast, lambda: getattr(layer, cast)(torch.float16))()
    assert layer.rows.dtype == layer.cols.dtype == torch.int64
    assert same(layer, before)
    torch.testing.assert_close(layer(x.to(layer.weight.dtype)).float(), expected, rtol=0.05, atol=0.1)


def test_memory_that_is_made_empty_loses_no_index() -> None:
    layer = pmss_layer()
    before = indices(layer)
    layer.to_empty(device="cpu")
    assert same(layer, before)
    layer.to("meta")
    assert layer.rows.is_meta
    copied = copy.deepcopy(layer)
    for other in (layer, copied):
        other.to_empty(device="cpu")
        assert same(other, before)
    assert same(layer.to("meta").to_empty(device="cpu"), before)


def test_they_follow_the_input() -> None:
    """Engines move parameters and buffers by hand; a layer whose indices stayed behind must still run."""
    layer = pmss_layer(memory="keep", dropout=0.5)
    before = indices(layer)
    for module in layer.modules():
        for name, old in module._parameters.items():
            if old is not None:
                module._parameters[name] = nn.Parameter(old.detach().to("meta"), requires_grad=old.requires_grad)
    x = random_like(3, 10).to("meta")
    layer(x).sum().backward()
    assert layer.core.weight.grad is not None
    assert same(layer, before)  # values that are not there cannot be brought back


def load(layer: Any, strict: bool = True, assign: bool = False, **changed: Any) -> None:
    state = {k: v.clone() for k, v in layer.state_dict().items()} | changed
    layer.load_state_dict({k: v for k, v in state.items() if v is not None}, strict=strict, assign=assign)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.arange(4.0), r"rows is float32, and whole numbers were expected"),
        (torch.tensor([0, 1, 1, 2]), r"rows has an index twice"),
        (torch.tensor([0, 1, 2, 12]), r"rows has indices outside 0\.\.11"),
        (torch.tensor([-1, 1, 2, 3]), r"rows has indices outside 0\.\.11"),
        (torch.arange(5), r"rows has the shape \[5\], and \[4\] was expected"),
        (None, r'Missing key\(s\) in state_dict: "rows"'),
    ],
)
def test_what_is_no_index_is_refused(rows: Any, message: str) -> None:
    layer = pmss_layer()
    before = indices(layer)
    with pytest.raises(RuntimeError, match=message):
        load(layer, rows=rows)
    assert same(layer, before)


@pytest.mark.parametrize("assign", [False, True])
def test_any_whole_numbers_are_loaded(assign: bool) -> None:
    layer = pmss_layer()
    taken = set(layer.rows.tolist())
    rows = torch.tensor([i for i in range(12) if i not in taken][:4])
    for dtype in (torch.int32, torch.int64, torch.uint8):
        load(layer, assign=assign, rows=rows.to(dtype))
        assert layer.rows.dtype == torch.int64
        assert torch.equal(layer.rows, rows)
        load(layer, assign=assign, rows=torch.arange(4))
    load(layer, strict=False, rows=None)
    assert torch.equal(layer.rows, torch.arange(4))
