"""Weighted sums of adapters, against the sum of the dense updates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_pmss.conversion.convert import adapted_layers
from lightning_pmss.methods.pmss.method import PMSSUpdate
from lightning_pmss.named import active_adapter, add_adapter, combine_adapters, load_adapters, set_adapter

from .conftest import Save, logits

Fresh = Callable[..., Any]


def _dense(model: Any) -> dict[str, Tensor]:
    found = {}
    for name, layer in adapted_layers(model).items():
        weight = layer.base_weight().double()
        found[name] = weight[:, layer.cols] @ layer.core_update().detach().double() @ weight[layer.rows]
    return found


def _check_sum(model: Any, weights: dict[str, float], name: str) -> None:
    parts = {}
    for part in weights:
        set_adapter(model, part)
        parts[part] = _dense(model)
    set_adapter(model, name)
    for layer, update in _dense(model).items():
        wanted = sum(weight * parts[part][layer] for part, weight in weights.items())
        assert isinstance(wanted, Tensor)
        assert (update - wanted).norm() <= 1e-5 * max(part[layer].norm() for part in parts.values()), layer


def test_on_one_skeleton_u_adds(fresh: Fresh, save: Save) -> None:
    model = fresh()
    load_adapters(model, {"a": save("a"), "b": save("b", seed=2, scale=0.5)})
    weights = {"a": 0.7, "b": -1.5}
    done = combine_adapters(model, "both", weights)
    assert active_adapter(model) == "a"
    assert len(done.agreeing) == len(adapted_layers(model))
    assert done.joined == {}
    assert str(done) == "both = 0.7 a + -1.5 b: 8 layers added at their own rank"
    _check_sum(model, weights, "both")


def test_on_different_skeletons_the_union_holds_the_sum(fresh: Fresh, save: Save) -> None:
    folders = {
        "a": save("a"),
        "b": save("b", seed=2, selection="random"),
        "c": save("c", seed=3, target_modules=["c_fc"]),
    }
    model = fresh()
    load_adapters(model, folders)
    with pytest.raises(
        ValueError, match=r"has rank \d+ in `transformer.*more than .*rank=\d+\), or train them on one sk"
    ):
        combine_adapters(model, "both", {"a": 1.0, "b": 1.0})
    model = fresh()
    load_adapters(model, folders, rank=12)
    weights = {"a": 0.5, "b": 0.25, "c": 2.0}
    done = combine_adapters(model, "all", weights)
    assert len(done.joined) == 8
    assert all(6 < rank <= 12 for rank in done.joined.values())
    assert "joined to rank" in str(done)
    _check_sum(model, weights, "all")


def test_a_difference_with_itself_is_the_base(fresh: Fresh, save: Save) -> None:
    model = fresh()
    load_adapters(model, {"a": save("a"), "b": save("b", seed=2)})
    combine_adapters(model, "none", {"a": 0.0})
    set_adapter(model, "none")
    torch.testing.assert_close(logits(model), logits(fresh()))
    # What was trained of the active one counts.
    set_adapter(model, "a")
    for layer in adapted_layers(model).values():
        layer.core.weight.data.mul_(3.0)
    combine_adapters(model, "a again", {"a": 1.0})
    wanted = logits(model)
    set_adapter(model, "a again")
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-4)


def test_sum_of_updates() -> None:
    torch.manual_seed(0)
    weight = torch.randn(7, 9, dtype=torch.float64)
    updates = [
        PMSSUpdate(torch.randn(2, 3, dtype=torch.float64), torch.tensor([5, 0, 2]), torch.tensor([8, 1])),
        PMSSUpdate(torch.randn(3, 2, dtype=torch.float64), torch.tensor([2, 6]), torch.tensor([1, 0, 8])),
    ]

    def dense(update: PMSSUpdate) -> Tensor:
        return weight[:, update.cols] @ update.U @ weight[update.rows]

    total = PMSSUpdate.weighted([(2.0, updates[0]), (-1.0, updates[1])])
    torch.testing.assert_close(dense(total), 2 * dense(updates[0]) - dense(updates[1]))
    assert (len(total.rows), len(total.cols)) == (4, 3)
    turned = PMSSUpdate(updates[0].U[:, [1, 0, 2]], updates[0].rows[[1, 0, 2]], updates[0].cols)
    torch.testing.assert_close(dense(PMSSUpdate.weighted([(1.0, updates[0]), (1.0, turned)])), 2 * dense(updates[0]))


def test_refusals(fresh: Fresh, save: Save) -> None:
    model = fresh()
    load_adapters(model, {"a": save("a"), "h": save("h", also_train=["ln_f"])})
    for weights, message in (
        ({}, "give one finite number per adapter"),
        ({"a": float("nan")}, "give one finite number per adapter"),
        ({"x": 1.0}, "no adapter is called 'x'; there are `a`, `h`"),
        ({"a": 1.0, "h": 1.0}, "`h` have modules trained in full, of which a weighted sum means nothing"),
    ):
        with pytest.raises(ValueError, match=message):
            combine_adapters(model, "new", weights)
    with pytest.raises(ValueError, match="an adapter is called 'a' already"):
        combine_adapters(model, "a", {"a": 1.0})
    add_adapter(model, "new", save("n"))
