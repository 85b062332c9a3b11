"""Quantised bases: the converted layer against the dense ``W + s C U R`` of the dequantised W, on the CPU."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import nn

from lightning_pmss import PMSSConfig, convert
from lightning_pmss.layers.fingerprint import fingerprint
from lightning_pmss.layers.quantised import (
    dequantised,
    dequantised_slice,
    is_quantised,
    quantisation_of,
    why_unusable,
)
from lightning_pmss.methods.pmss.layer import PMSSLinear

bnb: Any = pytest.importorskip(
    "bitsandbytes", reason="bitsandbytes is not installed: pip install lightning-pmss[quantised]"
)
torchao: Any = pytest.importorskip("torchao", reason="torchao is not installed: pip install lightning-pmss[quantised]")

KINDS = ("nf4", "nf4 double", "fp4", "int8", "torchao int8", "torchao int8 groups", "torchao int4")


def quantised_linear(kind: str, out_features: int, in_features: int, bias: bool, dtype: torch.dtype) -> nn.Linear:
    layer = nn.Linear(in_features, out_features, bias=bias, dtype=dtype)
    if kind.startswith("torchao"):
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
        from torchao.quantization.granularity import PerGroup

        config = {
            "torchao int8": lambda: Int8WeightOnlyConfig(),
            "torchao int8 groups": lambda: Int8WeightOnlyConfig(granularity=PerGroup(32)),
            "torchao int4": lambda: IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
        }[kind]()
        quantize_(layer, config)
        return layer
    if kind == "int8":
        made = bnb.nn.Linear8bitLt(in_features, out_features, bias=bias, has_fp16_weights=False)
    else:
        made = bnb.nn.Linear4bit(
            in_features,
            out_features,
            bias=bias,
            compute_dtype=dtype,
            quant_type=kind[:3],
            compress_statistics="double" in kind,
        )
    made = made.to(dtype)
    made.load_state_dict(layer.state_dict())
    return made.to("cpu")  # type: ignore[no-any-return]


class Net(nn.Module):
    """A thin, a wide and a square layer; the last one with a bias."""

    def __init__(self, kind: str, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide = quantised_linear(kind, 96, 128, False, dtype)
        self.tall = quantised_linear(kind, 192, 96, False, dtype)
        self.last = quantised_linear(kind, 192, 192, True, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.tall(torch.tanh(self.wide(x)))))  # type: ignore[no-any-return]


def trained(net: Net, **options: Any) -> dict[str, PMSSLinear]:
    convert(net, PMSSConfig(rank=8, scale=0.5, **options))
    layers = {name: m for name, m in net.named_modules() if isinstance(m, PMSSLinear)}
    torch.manual_seed(1)
    for layer in layers.values():
        nn.init.normal_(layer.core.weight, std=0.3)
    return layers


def dense(layer: PMSSLinear) -> torch.Tensor:
    w = dequantised(layer)
    return w + w[:, layer.cols] @ layer.core_update() @ w[layer.rows]


@pytest.mark.parametrize("memory", ["keep", "regather"])
@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients_equal_those_of_the_dense_weight(kind: str, memory: str) -> None:
    net = Net(kind)
    layers = trained(net, memory=memory)
    assert {name: layer.edit for name, layer in layers.items()}["tall"] == "input"
    assert layers["wide"].edit == "output"
    x = torch.randn(5, 3, 128, requires_grad=True)
    target = torch.randn(5, 3, 192)
    cores = [layer.core.weight for layer in layers.values()]
    output = net(x)
    found = torch.autograd.grad((output * target).sum(), [x, *cores])

    h = torch.tanh(x @ dense(layers["wide"]).T)
    h = torch.tanh(h @ dense(layers["tall"]).T)
    expected = h @ dense(layers["last"]).T + net.last.bias
    wanted = torch.autograd.grad((expected * target).sum(), [x, *cores])
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    for a, b in zip(found, wanted, strict=True):
        assert float((a - b).norm() / b.norm()) < 1e-5
    assert all(float(g.norm()) > 0 for g in found)


@pytest.mark.parametrize("kind", KINDS)
def test_slices_are_bit_for_bit_those_of_the_whole(kind: str) -> None:
    for layer in (
        quantised_linear(kind, 96, 128, True, torch.bfloat16),
        quantised_linear(kind, 64, 192, True, torch.float32),
    ):
        for dtype in (torch.float32, torch.bfloat16):
            whole = dequantised(layer, dtype=dtype)
            assert whole.dtype == dtype
            index = torch.tensor([5, 0, 61, 17])
            assert torch.equal(dequantised_slice(layer, index, 0, dtype), whole[index])
            assert torch.equal(dequantised_slice(layer, index, 1, dtype), whole[:, index])


@pytest.mark.parametrize("kind", KINDS)
def test_the_dequantised_weight_is_the_one_that_the_product_uses(kind: str) -> None:
    layer = quantised_linear(kind, 96, 128, False, torch.float32)
    x = torch.eye(128).requires_grad_()
    torch.testing.assert_close(layer(x).T, dequantised(layer), rtol=2e-6, atol=2e-7)


def test_the_first_step_from_zero_changes_nothing_and_trains() -> None:
    net = Net("nf4")
    x = torch.randn(4, 128)
    before = net(x.requires_grad_()).detach()
    convert(net, PMSSConfig(rank=8))
    after = net(x)
    assert torch.equal(before, after)
    after.square().sum().backward()
    for name, layer in net.named_modules():
        if isinstance(layer, PMSSLinear):
            assert layer.core.weight.dtype == torch.float32
            assert layer.core.weight.grad is not None
            assert float(layer.core.weight.grad.norm()) > 0, name


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao int8"])
def test_bfloat16_computes_in_bfloat16_and_keeps_u_wide(kind: str) -> None:
    net = Net(kind, torch.bfloat16)
    layers = trained(net)
    x = torch.randn(32, 128, dtype=torch.bfloat16)
    output = net(x.requires_grad_())
    assert output.dtype == torch.bfloat16
    assert all(layer.core.weight.dtype == torch.float32 for layer in layers.values())
    h = torch.tanh(x.float() @ dense(layers["wide"]).T)
    h = torch.tanh(h @ dense(layers["tall"]).T)
    expected = h @ dense(layers["last"]).T + net.last.bias.float()
    assert float((output.float() - expected).norm().detach() / expected.norm().detach()) < 0.02


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao int8"])
def test_autocast(kind: str) -> None:
    net = Net(kind)
    trained(net)
    x = torch.randn(32, 128)
    expected = net(x.requires_grad_())
    with torch.autocast("cpu", torch.bfloat16):
        output = net(x)
    output.float().sum().backward()
    assert float((output.float() - expected).norm().detach() / expected.norm().detach()) < 0.03


def test_selection_and_fingerprint_are_of_the_dequantised_weight() -> None:
    net = Net("nf4 double")
    plain = nn.ModuleDict({name: nn.Linear(1, 1, bias=False) for name in ("wide", "tall", "last")})
    for name, module in plain.items():
        module.weight = nn.Parameter(dequantised(getattr(net, name)))
        module.out_features, module.in_features = module.weight.shape
    report = convert(net, PMSSConfig(rank=8))
    convert(plain, PMSSConfig(rank=8))
    for name in plain:
        a, b = getattr(net, name), plain[name]
        assert torch.equal(a.rows, b.rows)
        assert torch.equal(a.cols, b.cols)
        assert fingerprint(*a.slices()) == fingerprint(*b.slices())
    assert report.total == 96 * 128 + 192 * 96 + 192 * 192 + 192 + 3 * 64


def test_training_goes_on_after_a_pass_in_evaluation_mode() -> None:
    """Without `prepare` a CPU with AVX512-BF16 packs the codes in this pass, and no gradient comes through again."""
    net = Net("nf4")
    layers = trained(net)
    x = torch.randn(4, 128)
    expected = net(x.clone().requires_grad_()).detach()
    net.eval()
    with torch.no_grad():
        torch.testing.assert_close(net(x), expected)
    net.train()
    output = net(x)
    output.sum().backward()
    assert torch.equal(output, expected)
    assert all(float(layer.core.weight.grad.norm()) > 0 for layer in layers.values())  # type: ignore[union-attr]


def test_packed_codes_are_refused() -> None:
    net = Net("nf4")
    net.wide.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match=r"`wide` .*packed for inference.*load the model anew"):
        convert(net, PMSSConfig(rank=8))
    assert not isinstance(net.tall, PMSSLinear)


@pytest.mark.parametrize("kind", ["nf4", "torchao int8"])
def test_weight_edit_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=r"edit='weight' .*kept in codes; set edit='auto'"):
        convert(Net(kind), PMSSConfig(rank=8, edit="weight"))


def test_weights_that_are_quantised_on_the_fly_are_refused() -> None:
    net = nn.Sequential(bnb.nn.Linear8bitLt(128, 96, has_fp16_weights=True))
    with pytest.raises(ValueError, match="load_in_8bit=True"):
        convert(net, PMSSConfig(rank=8))


def test_activation_quantisation_is_refused() -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    net = nn.Sequential(nn.Linear(128, 96))
    quantize_(net, Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(ValueError, match="use a weight-only configuration"):
        convert(net, PMSSConfig(rank=8))


def test_unknown_quantised_layers_are_refused_by_name() -> None:
    class QuantLinear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("qweight", torch.zeros(16, 96, dtype=torch.int32))

    net = nn.ModuleDict({"proj": QuantLinear()})
    with pytest.raises(ValueError, match=r"`proj` is a QuantLinear: GPTQ, AWQ, HQQ .*Supported: bitsandbytes 4-bit"):
        convert(net, PMSSConfig(rank=8))


@pytest.mark.parametrize("kind", KINDS)
def test_a_deep_copy_computes_the_same(kind: str) -> None:
    net = Net(kind)
    trained(net)
    x = torch.randn(4, 128)
    again = copy.deepcopy(net)
    assert torch.equal(net(x.requires_grad_()), again(x))


def test_names_of_the_kinds() -> None:
    names = [quantisation_of(quantised_linear(kind, 96, 128, False, torch.float32)) for kind in KINDS]
    assert names[:4] == ["bitsandbytes nf4", "bitsandbytes nf4", "bitsandbytes fp4", "bitsandbytes int8"]
    assert all(re.match("torchao Int", str(name)) for name in names[4:])
    assert not is_quantised(nn.Linear(3, 3))
    assert quantisation_of(nn.Linear(3, 3)) is None
    assert why_unusable(nn.Linear(3, 3)) is None
    assert why_unusable(nn.Identity()) is None


@pytest.mark.parametrize("kind", ["nf4", "torchao int8"])
def test_compiles_in_one_graph(kind: str) -> None:
    net = Net(kind)
    layers = trained(net)
    x = torch.randn(4, 128)
    expected = net(x)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    output = compiled(x)
    output.sum().backward()
    torch.testing.assert_close(output, expected)
    assert all(float(layer.core.weight.grad.norm()) > 0 for layer in layers.values())  # type: ignore[union-attr]
