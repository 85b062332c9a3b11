"""BAT against the dense weight and peft's own, and what it keeps for the backward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from lightning_pmss import BATConfig, convert, save_adapter
from lightning_pmss.conversion.convert import adapted_layers
from lightning_pmss.methods.bat import FORMS
from lightning_pmss.named import combine_adapters, load_adapters, set_adapter

TARGETS = ["q_proj", "v_proj", "down_proj"]
every_form = pytest.mark.parametrize("form", FORMS)


def trained(out: int, inp: int, bias: bool = True, dtype: torch.dtype = torch.float64, **options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(inp, out, bias, dtype=dtype))
    convert(net, BATConfig(target_modules=["0"], **options))
    nn.init.normal_(net[0].core.B, std=0.5)
    return net


def dense(weight: Tensor, b: Tensor, form: str) -> Tensor:
    """W' of W ``[out, in]``, block by block; zeros stand beyond its border."""
    (out, inp), r = weight.shape, b.shape[1]
    m, n = -(-out // r), -(-inp // r)
    filled = torch.zeros(m * r, n * r, dtype=weight.dtype)
    filled[:out, :inp] = weight
    eye = torch.eye(r, dtype=weight.dtype)
    rows = []
    for i in range(m):
        row = []
        for j in range(n):
            k = i if form == "column" else j
            own = b[k * r : (k + 1) * r]
            row.append(filled[i * r : (i + 1) * r, j * r : (j + 1) * r] @ (eye + own) + own)
        rows.append(torch.cat(row, 1))
    return torch.cat(rows)[:out, :inp]


@every_form
@pytest.mark.parametrize(
    ("out", "inp", "rank"), [(12, 20, 4), (20, 12, 2), (12, 20, 5), (20, 12, 5), (7, 11, 3), (6, 5, 5)]
)
@pytest.mark.parametrize("bias", [True, False])
def test_is_the_dense_weight_where_the_rank_divides_and_where_not(
    form: str, out: int, inp: int, rank: int, bias: bool
) -> None:
    net = trained(out, inp, bias, rank=rank, form=form)
    layer: Any = net[0]
    b = layer.core.B.detach().clone().requires_grad_()
    side = out if form == "column" else inp
    assert b.shape == (-(-side // rank) * rank, rank)
    x = torch.randn(2, 7, inp, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 7, out, dtype=torch.float64)
    other = x.detach().clone().requires_grad_()
    weight = layer.weight.detach()
    expected = F.linear(other, dense(weight, b, form), layer.bias)
    torch.testing.assert_close(net(x), expected, rtol=1e-12, atol=1e-12)
    change = (dense(weight, b, form) - weight).detach()
    with torch.no_grad():
        for rows in (slice(None), slice(0, 1), slice(2, 6), slice(5, None)):
            torch.testing.assert_close(layer.update().delta(weight, rows), change[rows], rtol=1e-12, atol=1e-12)
        assert float(change.abs().max()) <= layer.update().bound(weight)
    ((net(x) - y) ** 2).sum().backward()
    ((expected - y) ** 2).sum().backward()
    torch.testing.assert_close(layer.core.B.grad, b.grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-10, atol=1e-10)


@every_form
def test_conv1d(form: str) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=12, n_layer=1, n_head=2)).eval().double()
    ids = torch.arange(9)[None]
    convert(model, BATConfig(target_modules=["c_attn", "c_proj"], rank=4, form=form))
    plain = GPT2LMHeadModel(model.config).eval().double()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if ".core." not in k})
    for name, layer in adapted_layers(model).items():
        nn.init.normal_(layer.core.B, std=0.1)  # type: ignore[arg-type]
        stored = plain.get_submodule(name).weight  # type: ignore[union-attr]
        stored.data.copy_(dense(stored.data.T, layer.core.B.detach(), form).T)  # type: ignore[operator, union-attr]
    model.requires_grad_(True)(ids).logits.sum().backward()
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-10, atol=1e-10)


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(16, 24), (18, 22)])
def test_the_backward_pass_keeps_x_and_no_weight(form: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    tokens, rank, (out, inp) = 31, 8, shape
    net = trained(out, inp, rank=rank, dtype=dtype, form=form)
    layer: Any = net[0]
    known = {t.untyped_storage().data_ptr() for t in (layer.weight, layer.core.B)}
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        net(torch.randn(tokens, inp, dtype=dtype, requires_grad=True))
    per_token = [
        t.untyped_storage().nbytes() for t in saved.values() if t.untyped_storage().nbytes() >= tokens * inp * 2
    ]
    padded = inp if form == "column" else inp + -inp % rank
    assert per_token == [tokens * padded * dtype.itemsize]
    side = out if form == "column" else inp
    others = [t.numel() for t in saved.values() if t.untyped_storage().nbytes() < tokens * inp * 2]
    assert sum(others) <= (side + rank) * rank  # B in the dtype of the products
    assert layer.method.kept_per_token(shape, rank) == inp


@pytest.mark.parametrize("autocast", [False, True])
def test_a_small_update_is_not_lost_in_low_precision(autocast: bool) -> None:
    net = trained(16, 24, bias=False, rank=8, dtype=torch.float32)
    layer: Any = net[0]
    layer.core.B.data.mul_(1e-3 / layer.core.B.norm())  # far less than a step of bfloat16 beside the identity
    layer.weight.data = layer.weight.bfloat16().float()
    x = torch.randn(64, 24).bfloat16()
    expected = x.double() @ layer.update().delta(layer.weight.double(), dtype=torch.float64).T
    layer.base = lambda x: x.new_zeros(64, 16)  # the sum with the base's own answer is rounded for every method
    if autocast:
        with torch.autocast("cpu", torch.bfloat16):
            found = net(x.float())
    else:
        found = net.to(torch.bfloat16)(x)
    assert (found.double() - expected).norm() < 0.02 * expected.norm()


def test_the_report_says_that_a_rank_was_clipped_and_an_unknown_form_is_refused() -> None:
    report = convert(nn.Sequential(nn.Linear(20, 12)), BATConfig(target_modules=["0"]))
    assert (report.layers[0].rank, report.layers[0].requested_rank) == (12, 64)
    with pytest.raises(ValueError, match=r"form='col' is not known; choose one of \['column', 'row'\]"):
        BATConfig(form="col")


def test_sums_of_adapters_of_one_rank(tmp_path: Path) -> None:
    x, expected = torch.randn(5, 20), {}

    def fresh() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(20, 12))

    for seed, (name, rank) in enumerate({"a": 4, "b": 4, "c": 3}.items()):
        net = fresh()
        convert(net, BATConfig(target_modules=["0"], rank=rank))
        torch.manual_seed(seed)
        nn.init.normal_(net[0].core.B)
        save_adapter(net, tmp_path / name)
        expected[name] = net(x)
    net = fresh()
    base = net(x)
    load_adapters(net, {name: tmp_path / name for name in "abc"})
    combine_adapters(net, "sum", {"a": 0.5, "b": -2.0})
    for name in ("c", "sum", "a"):
        set_adapter(net, name)
        sums = base + 0.5 * (expected["a"] - base) - 2 * (expected["b"] - base)
        torch.testing.assert_close(net(x), expected.get(name, sums), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"BAT of ranks \[3, 4\] has no sum that is BAT"):
        combine_adapters(net, "other", {"a": 1.0, "c": 1.0})


def test_logits_and_gradients_are_pefts(tiny_llama: str) -> None:
    peft = pytest.importorskip("peft")
    rival = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_llama),
        peft.MissConfig(r=8, target_modules=TARGETS, init_weights="bat"),
    )
    ours = AutoModelForCausalLM.from_pretrained(tiny_llama)
    convert(ours, BATConfig(target_modules=TARGETS, rank=8))
    torch.manual_seed(0)
    blocks = {}
    for name, layer in adapted_layers(ours).items():
        blocks[name] = rival.get_parameter(f"base_model.model.{name}.miss_block.default")
        nn.init.normal_(blocks[name], std=0.1)
        layer.core.B.data.copy_(blocks[name].flatten(0, 1))  # type: ignore[operator, union-attr]
    ids = torch.arange(24).view(2, 12)
    found, expected = ours(input_ids=ids, labels=ids), rival(input_ids=ids, labels=ids)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    found.loss.backward()
    expected.loss.backward()
    for name, layer in adapted_layers(ours).items():
        gradient = layer.core.B.grad.view_as(blocks[name])  # type: ignore[operator, union-attr]
        torch.testing.assert_close(gradient, blocks[name].grad, rtol=1e-4, atol=1e-6)
