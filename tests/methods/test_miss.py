"""MiSS against the dense weight and peft's own, and what it keeps for the backward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from lightning_pmss import MiSSConfig, convert, load_adapter, save_adapter
from lightning_pmss.conversion.convert import adapted_layers
from lightning_pmss.named import add_adapter, combine_adapters, load_adapters, set_adapter

TARGETS = ["q_proj", "v_proj", "down_proj"]


def trained(out: int, inp: int, bias: bool = True, dtype: torch.dtype = torch.float64, **options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(inp, out, bias, dtype=dtype))
    convert(net, MiSSConfig(target_modules=["0"], **options))
    nn.init.normal_(net[0].core.D)
    return net


def dense(d: Tensor, out: int, inp: int) -> Tensor:
    """The change of W ``[out, in]``, entry by entry."""
    rows, columns = d.shape
    return torch.stack([torch.stack([d[i % rows, o % columns] for i in range(inp)]) for o in range(out)])


@pytest.mark.parametrize(("out", "inp"), [(12, 20), (20, 12), (6, 5)])
@pytest.mark.parametrize("rank", [1, 3, 5])
@pytest.mark.parametrize("mini", [None, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_is_the_dense_weight_where_the_rank_divides_and_where_not(
    out: int, inp: int, rank: int, mini: int | None, bias: bool
) -> None:
    net = trained(out, inp, bias, rank=rank, mini_rank=mini)
    layer: Any = net[0]
    d = layer.core.D.detach().clone().requires_grad_()
    assert d.shape == (rank, mini or out)
    x = torch.randn(2, 7, inp, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 7, out, dtype=torch.float64)
    other = x.detach().clone().requires_grad_()
    expected = F.linear(other, layer.weight + dense(d, out, inp), layer.bias)
    torch.testing.assert_close(net(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.update().delta(layer.weight), dense(d, out, inp), rtol=0, atol=0)
    ((net(x) - y) ** 2).sum().backward()
    ((expected - y) ** 2).sum().backward()
    torch.testing.assert_close(layer.core.D.grad, d.grad, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-11, atol=1e-11)


def test_conv1d() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=12, n_layer=1, n_head=2)).eval().double()
    ids = torch.arange(9)[None]
    convert(model, MiSSConfig(target_modules=["c_attn", "c_proj"], rank=5))
    plain = GPT2LMHeadModel(model.config).eval().double()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if ".core." not in k})
    for name, layer in adapted_layers(model).items():
        nn.init.normal_(layer.core.D)  # type: ignore[arg-type]
        weight = plain.get_submodule(name).weight.data  # type: ignore[union-attr]
        weight += dense(layer.core.D.detach(), *weight.T.shape).T  # type: ignore[operator, union-attr]
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-10, atol=1e-10)


def test_the_rank_is_clipped_to_the_input_alone() -> None:
    net = nn.Sequential(nn.Linear(20, 4))
    report = convert(net, MiSSConfig(target_modules=["0"], rank=64))
    assert (report.layers[0].rank, report.layers[0].requested_rank) == (20, 64)


def test_refusals() -> None:
    with pytest.raises(
        ValueError, match=r"`0` has 12 outputs, which mini_rank=5 does not divide. Type one of 1, 2, 3, 4"
    ):
        convert(nn.Sequential(nn.Linear(20, 12)), MiSSConfig(target_modules=["0"], mini_rank=5))
    for mini in (0, True, 1.5):
        with pytest.raises(ValueError, match="mini_rank=.* must be a whole number of at least 1, or None"):
            MiSSConfig(mini_rank=mini)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"dropout=1.0 must lie in \[0, 1\)"):
        MiSSConfig(dropout=1.0)


def test_dropout_acts_on_the_input_of_the_sum_and_only_in_training() -> None:
    net = trained(3, 400, rank=400, dropout=0.5)  # one block, so that the sum is the input
    layer: Any = net[0]
    x = torch.ones(1, 400, dtype=torch.float64)
    base = layer.base(x)
    net.eval()
    torch.testing.assert_close(net(x) - base, layer.core.D.sum(0)[None])
    net.train()
    layer.core.D.data.fill_(1.0)
    kept = float((net(x) - base)[0, 0]) / 2  # those that are kept are doubled
    assert 160 < kept < 240
    assert kept == pytest.approx(round(kept))


@pytest.mark.parametrize("inp", [24, 22])
def test_the_backward_pass_keeps_the_sums_alone(inp: int) -> None:
    tokens, out, rank = 31, 18, 4
    net = trained(out, inp, rank=rank, dtype=torch.float32)
    layer: Any = net[0]
    known = {t.untyped_storage().data_ptr() for t in (layer.weight, layer.core.D)}
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        net(torch.randn(tokens, inp, requires_grad=True))
    assert sum(t.numel() for t in saved if tokens in t.shape) == tokens * rank
    assert sum(t.numel() for t in saved if tokens not in t.shape) <= rank * out  # D
    assert layer.method.kept_per_token((out, inp), rank) == rank


def test_adapters_of_several_ranks(tmp_path: Path) -> None:
    x, expected = torch.randn(5, 20), {}
    options = {"a": {"rank": 4}, "b": {"rank": 6}, "c": {"rank": 4, "mini_rank": 3}}
    for name, given in options.items():
        torch.manual_seed(ord(name))
        net = nn.Sequential(nn.Linear(20, 12))
        net[0].load_state_dict({"weight": torch.ones(12, 20), "bias": torch.ones(12)})
        convert(net, MiSSConfig(target_modules=["0"], **given))  # type: ignore[arg-type]
        nn.init.normal_(net[0].core.D)
        save_adapter(net, tmp_path / name)
        expected[name] = net(x)
    net = nn.Sequential(nn.Linear(20, 12))
    net[0].load_state_dict({"weight": torch.ones(12, 20), "bias": torch.ones(12)})
    base = net(x)
    load_adapters(net, {name: tmp_path / name for name in "ab"}, rank=12)
    add_adapter(net, "c", tmp_path / "c")
    for name in ("c", "a", "b", "c", "b"):
        set_adapter(net, name)
        torch.testing.assert_close(net(x), expected[name], rtol=1e-5, atol=1e-5)
        loss = net(x).square().sum()
        loss.backward()
        assert net[0].core.D.grad.shape == net[0].core.D.shape
    combine_adapters(net, "sum", {"a": 0.5, "b": -1.0, "c": 2.0})
    set_adapter(net, "sum")
    found = base + 0.5 * (expected["a"] - base) - (expected["b"] - base) + 2 * (expected["c"] - base)
    torch.testing.assert_close(net(x), found, rtol=1e-4, atol=1e-4)


def test_an_adapter_of_another_mini_rank_is_not_loaded_into_a_converted_layer(tmp_path: Path) -> None:
    net = trained(12, 20, dtype=torch.float32, rank=4, mini_rank=1)
    save_adapter(net, tmp_path / "adapter")
    other = trained(12, 20, dtype=torch.float32, rank=4)
    before = other[0].core.D.clone()
    with pytest.raises(ValueError, match="already converted differently"):
        load_adapter(other, tmp_path / "adapter")
    assert torch.equal(other[0].core.D, before)


@pytest.mark.parametrize("mini", [None, 8])
@pytest.mark.parametrize("rank", [8, 12])  # 12 divides neither 32 nor 64
def test_logits_and_gradients_are_pefts(tiny_llama: str, rank: int, mini: int | None) -> None:
    peft = pytest.importorskip("peft")
    options = {} if mini is None else {"init_weights": "mini", "mini_r": mini}
    rival = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_llama), peft.MissConfig(r=rank, target_modules=TARGETS, **options)
    )
    ours = AutoModelForCausalLM.from_pretrained(tiny_llama)
    convert(ours, MiSSConfig(target_modules=TARGETS, rank=rank, mini_rank=mini))
    torch.manual_seed(0)
    blocks = {}
    for name, layer in adapted_layers(ours).items():
        blocks[name] = rival.get_parameter(f"base_model.model.{name}.miss_block.default")
        nn.init.normal_(blocks[name], std=0.1)
        layer.core.D.data.copy_(blocks[name])  # type: ignore[operator, union-attr]
    ids = torch.arange(24).view(2, 12)
    found, expected = ours(input_ids=ids, labels=ids), rival(input_ids=ids, labels=ids)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    found.loss.backward()
    expected.loss.backward()
    for name, layer in adapted_layers(ours).items():
        torch.testing.assert_close(layer.core.D.grad, blocks[name].grad, rtol=1e-4, atol=1e-6)
