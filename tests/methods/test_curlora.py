"""CURLoRA: the formula, what is drawn, and what it shares with PMSS."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_pmss import CURLoRAConfig, PMSSConfig, convert
from lightning_pmss.conversion.convert import adapted_layers
from tests.methods.dense import TARGETS, is_dense, layers


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_layer_is_the_formula(scale: float) -> None:
    config = CURLoRAConfig(target_modules=TARGETS, rank=3, scale=scale)
    model = layers()
    convert(model, config)
    drawn = {layer.core.weight.shape: layer.indices() for layer in adapted_layers(model).values()}
    assert len(drawn) == 1
    places = iter(adapted_layers(model).values())

    def changed(weight: torch.Tensor, core: nn.Module) -> torch.Tensor:
        index = next(places).indices()  # the same seed draws the same
        u: torch.Tensor = core.weight  # type: ignore[assignment]
        return weight + scale * weight[:, index["cols"]] @ u @ weight[index["rows"]]

    is_dense(config, changed)


def test_weak_rows_and_columns_are_drawn_more_often() -> None:
    weight = torch.randn(60, 60, generator=torch.Generator().manual_seed(0))
    weight[:30] *= 10
    weight[:, 30:] *= 10
    rows, columns = [], []
    for seed in range(40):
        model = nn.Sequential(nn.Linear(60, 60))
        model[0].weight.data.copy_(weight)
        convert(model, CURLoRAConfig(target_modules=["0"], rank=6, seed=seed))
        found = adapted_layers(model)["0"].indices()
        rows.append(found["rows"])
        columns.append(found["cols"])
        assert len(found["rows"].unique()) == 6
    assert float((torch.cat(rows) >= 30).float().mean()) > 0.9
    assert float((torch.cat(columns) < 30).float().mean()) > 0.9


def test_it_is_pmss_with_these_options() -> None:
    one, other = layers(), layers()
    convert(one, CURLoRAConfig(target_modules=TARGETS))
    convert(
        other,
        PMSSConfig(target_modules=TARGETS, rank=16, selection="inverse_norm", coordinates="raw", scale=1.0),
    )
    for a, b in zip(adapted_layers(one).values(), adapted_layers(other).values(), strict=True):
        assert a.tensors().keys() == b.tensors().keys()
        assert all(torch.equal(value, b.tensors()[name]) for name, value in a.tensors().items())
        assert a.scale == b.scale == 1


@pytest.mark.parametrize("option", [{"columns": "all"}, {"selection": "lupp"}, {"coordinates": "orthonormal"}])
def test_what_makes_it_another_method_is_refused(option: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="is not known; choose one of"):
        CURLoRAConfig(**option)  # type: ignore[arg-type]
