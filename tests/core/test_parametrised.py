"""Linear layers whose ``weight`` is no plain parameter of their own: left out with the reason, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations as modern
from torch.nn.utils import parametrize, prune, remove_weight_norm, spectral_norm, weight_norm
from torch.testing._internal.two_tensor import TwoTensor

from lightning_pmss import PMSSConfig, PMSSLinear, convert, load_adapter, merge, save_adapter
from lightning_pmss.conversion.convert import adapted_layers

SIZE = 16


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).T


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def registered(layer: nn.Linear) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


def pruned(layer: nn.Linear) -> nn.Module:
    module: nn.Module = prune.l1_unstructured(layer, "weight", 0.3)
    return module


class Getter(nn.Linear):
    """Takes its weight from another layer."""

    def __init__(self, other: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.__dict__["other"] = other
        self.in_features, self.out_features = other.in_features, other.out_features
        self.register_parameter("bias", None)

    @property
    def weight(self) -> nn.Parameter:  # type: ignore[override]
        return self.__dict__["other"].weight


class Scaled(nn.Linear):
    """Owns a weight, and computes with another."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return 3 * self._parameters["weight"]  # type: ignore[operator]


def buffered(layer: nn.Linear) -> nn.Module:
    weight = layer.weight.detach()
    del layer.weight
    layer.register_buffer("weight", weight)
    return layer


def attribute(layer: nn.Linear) -> nn.Module:
    weight = layer.weight.detach()
    del layer.weight
    layer.__dict__["weight"] = weight
    return layer


def subclass(layer: nn.Linear) -> nn.Module:
    layer.weight = nn.Parameter(TwoTensor(layer.weight.detach(), layer.weight.detach().clone()))
    return layer


FORMS: dict[str, tuple[Callable[[nn.Linear], nn.Module], str]] = {
    "weight_norm": (modern.weight_norm, r"is computed by a parametrisation \(WeightNorm\)"),
    "spectral_norm": (modern.spectral_norm, r"is computed by a parametrisation \(SpectralNorm\)"),
    "orthogonal": (modern.orthogonal, r"is computed by a parametrisation \(Orthogonal\)"),
    "registered": (registered, r"is computed by a parametrisation \(Symmetric\)"),
    "old weight_norm": (weight_norm, "is computed by weight_norm before each pass"),
    "old spectral_norm": (spectral_norm, "is computed by spectral_norm before each pass"),
    "pruned": (pruned, "is computed by pruning before each pass"),
    "getter": (Getter, "is no parameter of the layer"),
    "buffer": (buffered, "is a buffer, not a parameter"),
    "attribute": (attribute, "is no parameter of the layer"),
    "tensor subclass": (subclass, "is a TwoTensor, whose numbers cannot be read row by row"),
}


def net(form: Callable[[nn.Linear], nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(SIZE, SIZE), form(nn.Linear(SIZE, SIZE)), nn.Linear(SIZE, SIZE))


@pytest.mark.parametrize("target", ["all-linear", r"[012]"])
@pytest.mark.parametrize("name", FORMS)
def test_left_out_with_the_reason(name: str, target: str) -> None:
    form, reason = FORMS[name]
    model = net(form).eval()
    x = torch.randn(5, SIZE)
    with torch.no_grad():
        before = model(x)
    report = convert(model, PMSSConfig(rank=4, target_modules=target))
    assert [layer.name for layer in report.layers] == list(adapted_layers(model)) == ["0", "2"]
    with pytest.raises(AssertionError, match=reason):  # the reason is the whole of the entry
        raise AssertionError(report.left_out["1"])
    with torch.no_grad():
        torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("name", FORMS)
def test_refused_by_name(name: str) -> None:
    form, reason = FORMS[name]
    model = net(form)
    with pytest.raises(ValueError, match=rf"`1` \(\w+\): its weight {reason}.*exclude_modules"):
        convert(model, PMSSConfig(rank=4, target_modules=["1"]))
    assert not any(isinstance(m, PMSSLinear) for m in model.modules())


def test_a_weight_computed_from_the_own_one_is_left_out() -> None:
    model = net(lambda layer: layer)
    model[1].__class__ = Scaled
    report = convert(model, PMSSConfig(rank=4))
    assert report.left_out["1"] == "its weight is computed by Scaled"


def test_missing_weights_are_left_out() -> None:
    model = net(lambda layer: layer)
    model[1].weight = None
    del model[2].weight
    report = convert(model, PMSSConfig(rank=4))
    assert (report.left_out["1"], report.left_out["2"]) == ("it has no weight", "it has no weight")


def test_a_layer_whose_weight_another_one_reads_is_refused() -> None:
    first = nn.Linear(SIZE, SIZE)
    with pytest.raises(ValueError, match=r"`0` shares its weight with `1`"):
        convert(nn.Sequential(first, Getter(first)), PMSSConfig(rank=4))


def test_looking_for_targets_computes_no_weight() -> None:
    """Each read of a spectral norm's weight in training mode moves its buffers."""
    model = nn.Sequential(nn.Linear(SIZE, SIZE), modern.spectral_norm(nn.Linear(SIZE, SIZE)))
    before = {key: value.clone() for key, value in model[1].state_dict().items()}
    convert(model, PMSSConfig(rank=4))
    assert all(torch.equal(value, before[key]) for key, value in model[1].state_dict().items())


def test_a_removed_norm_and_a_parametrised_bias_are_converted() -> None:
    model = nn.Sequential(remove_weight_norm(weight_norm(nn.Linear(SIZE, SIZE))), nn.Linear(SIZE, SIZE))
    parametrize.register_parametrization(model[1], "bias", Double())
    x = torch.randn(5, SIZE)
    before = model(x).detach()
    assert len(convert(model, PMSSConfig(rank=4)).layers) == 2
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("form", [modern.weight_norm, weight_norm, pruned])
def test_adapter_and_merge_of_a_model_that_has_such_a_layer(
    form: Callable[[nn.Linear], nn.Module], tmp_path: Path
) -> None:
    model = net(form).double()
    convert(model, PMSSConfig(rank=4))
    for layer in adapted_layers(model).values():
        nn.init.normal_(layer.core.weight)
    x = torch.randn(5, SIZE, dtype=torch.float64)
    plain = net(form).double()
    with torch.no_grad():
        trained = model(x)
        for name, layer in adapted_layers(model).items():
            w = layer.weight
            plain[int(name)].weight.copy_(w + w[:, layer.cols] @ layer.core_update() @ w[layer.rows])
        torch.testing.assert_close(plain(x), trained)
        save_adapter(model, tmp_path / "adapter")
        loaded = net(form).double()
        load_adapter(loaded, tmp_path / "adapter")
        torch.testing.assert_close(loaded(x), trained)
        merge(loaded)
        torch.testing.assert_close(loaded(x), trained)
