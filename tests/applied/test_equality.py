"""Convolutions and embeddings with adapters compute what the dense W' computes: outputs and all gradients, in float64.

The reference is torch's own layer with ``W + delta(W)`` in the place of its weight, made by autograd of the same tensors.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_pmss import convert, merge, unmerge
from lightning_pmss.conversion.convert import adapted_layers
from tests.applied.toys import LAYERS, PAIRS, config_of, inputs, net, one, targets, train
from tests.methods.cases import CASES

every_pair = pytest.mark.parametrize(("method", "kind"), PAIRS)
every_method = pytest.mark.parametrize("method", list(CASES))


def dense(layer: Any, kind: str, x: Tensor) -> Tensor:
    """torch's own layer with W'; what is trained stays in the graph."""
    weight = layer.base_weight()
    changed = weight + layer.update().delta(weight)
    stored = changed.T if "embedding" in kind else changed.view(layer.weight.shape)
    plain = LAYERS[kind][0]().to(x.dtype if x.is_floating_point() else stored.dtype)
    if "embedding" in kind:
        plain.sparse = False
    own = {"weight": stored} | ({} if getattr(layer, "bias", None) is None else {"bias": layer.bias})
    answer: Tensor = torch.func.functional_call(plain, own, (x,))
    return answer


def gradients(output: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(9), dtype=output.dtype)
    return list(torch.autograd.grad((output * weight).sum(), leaves))


@every_pair
def test_outputs_and_all_gradients_are_those_of_the_dense_weight(method: str, kind: str) -> None:
    model, x = one(kind), inputs(kind)
    plain = model(x)
    report = convert(model, config_of(method))
    torch.testing.assert_close(model(x), plain, rtol=1e-4, atol=1e-4)
    train(model)
    layer = adapted_layers(model)["0"]
    trained = list(layer.core.trained().values())
    assert report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad) > 0
    leaves = [*([x] if x.requires_grad else []), *trained]
    output, wanted = model(x), dense(layer, kind, x)
    assert (wanted - plain).abs().max() > 1e-3
    torch.testing.assert_close(output, wanted, rtol=1e-10, atol=1e-12)
    found, expected = gradients(output, leaves), gradients(wanted, leaves)
    for own, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-9, atol=1e-11)
    assert any(bool(gradient.any()) for gradient in expected[-len(trained) :])
    again = gradients(checkpoint(model, x, use_reentrant=False), leaves)
    assert all(torch.equal(one, other) for one, other in zip(again, found, strict=True))


@every_pair
def test_merged_is_the_dense_weight_and_comes_back_bit_for_bit(method: str, kind: str) -> None:
    model, x = one(kind, torch.float32), inputs(kind, torch.float32)
    before = model[0].weight.detach().clone()
    convert(model, config_of(method))
    train(model)
    wanted = model(x)
    merge(model)
    assert model[0].weight.shape == before.shape
    torch.testing.assert_close(model.eval()(x), wanted, rtol=1e-4, atol=1e-5)
    unmerge(model)
    assert torch.equal(model[0].weight, before)


@every_pair
def test_low_precision_is_near_float32(method: str, kind: str) -> None:
    model, x = one(kind, torch.float32), inputs(kind, torch.float32)
    convert(model, config_of(method))
    train(model)
    expected, low = model(x), copy.deepcopy(model).to(torch.bfloat16)
    layer = adapted_layers(low)["0"]
    assert all(t.dtype == torch.float32 for t in layer.core.trained().values())
    found = low(x.to(torch.bfloat16) if x.is_floating_point() else x)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() < 0.03 * expected.norm()
    found.float().square().sum().backward()
    assert all(t.grad is not None and bool(t.grad.isfinite().all()) for t in layer.core.trained().values())
    with torch.autocast("cpu", torch.bfloat16):
        mixed, plain = model(x), one(kind, torch.float32)(x)
    assert mixed.dtype == plain.dtype
    assert (mixed.float() - expected).norm() < 0.03 * expected.norm()
    mixed.float().square().sum().backward()
    assert all(t.grad is not None for t in adapted_layers(model)["0"].core.trained().values())


@every_method
def test_a_small_change_is_not_rounded_away_in_bfloat16(method: str) -> None:
    """W' in bfloat16 would lose a change of a thousandth of W."""
    model = one("conv2d", torch.float32)
    convert(model, config_of(method))
    train(model, size=1e-3)
    low = copy.deepcopy(model).to(torch.bfloat16)
    x = inputs("conv2d", torch.float32).detach()
    x = x.to(torch.bfloat16).float().requires_grad_()
    for one_of, at in ((low, x.to(torch.bfloat16)), (model, x)):
        one_of(at).float().square().sum().backward()
    for own, theirs in zip(low[0].core.trained().values(), model[0].core.trained().values(), strict=True):
        assert (own.grad - theirs.grad).norm() < 0.05 * theirs.grad.norm()


@every_method
def test_a_network_of_all_kinds_trains_and_compiles(method: str) -> None:
    model, ids = net(), torch.randint(0, 23, (3, 9), generator=torch.Generator().manual_seed(2))
    report = convert(model, config_of(method, *targets(method)))
    assert [layer.name for layer in report.layers] == targets(method)
    train(model)
    expected = model(ids)
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids), expected, rtol=1e-4, atol=1e-5)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    losses = []
    for _ in range(5):
        loss = (model(ids) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("method", ["pmss", "pmss columns=all", "miss", "lora_xs", "curlora", "lora"])
@pytest.mark.parametrize("options", [{}, {"padding": "same"}])
def test_the_input_of_a_convolution_is_kept_by_lora_alone(method: str, options: dict[str, Any]) -> None:
    """Not even by the base's own product, of which autograd keeps it."""
    kept: list[torch.Size] = []
    layer = nn.Sequential(nn.Conv2d(16, 24, 3, **{"padding": 1} | options))
    convert(layer, config_of(method))
    x = torch.randn(1, 16, 20, 20, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.shape), t)[1], lambda t: t):
        layer(x)
    assert any(shape[1:] == (4, 20, 20) for shape in kept)
    assert any(shape[1] == 16 and shape[2] >= 20 for shape in kept if len(shape) == 4) is (method == "lora")
