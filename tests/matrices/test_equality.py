"""Modules with converted parameters compute what they compute with the dense W': outputs and all gradients, in float64.

The reference is the module before its conversion, with ``W + delta(W)``, made by autograd from the same trained tensors, in the
parameter's place (`torch.func.functional_call`).
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_pmss import LoRAConfig, PMSSConfig, convert, merge, unmerge
from lightning_pmss.merging import merged_state_dict
from lightning_pmss.named import disable_adapter
from tests.experts.toys import train
from tests.matrices.toys import TOYS, inputs, made, matrices
from tests.methods.cases import CASES

every_method = pytest.mark.parametrize("method", list(CASES))
every_toy = pytest.mark.parametrize("name", list(TOYS))
one_router = pytest.mark.parametrize(
    "name", [name for name in TOYS if name not in ("qwen3_moe", "gpt_oss", "deepseek")]
)


def converted(name: str, method: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Any, Any]:
    """The model with trained tensors that are not zero, and as it was before."""
    model = made(name, dtype)
    plain = copy.deepcopy(model)
    settings = {"target_modules": [], "target_parameters": TOYS[name].patterns, "rank": 3}
    convert(model, CASES[method](**settings | options))
    return train(model), plain


def dense(model: Any) -> dict[str, Tensor]:
    """W' of each parameter by its name in the model, differentiable in the trained tensors."""
    names = {id(p): n for n, p in model.named_parameters()}
    found = {}
    for layer in matrices(model).values():
        weight = layer.weight.detach()
        found[names[id(layer.weight)]] = weight + layer.update().delta(weight)
    return found


def gradients(output: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(9), dtype=output.dtype)
    return list(torch.autograd.grad((output * weight).sum(), leaves, allow_unused=False))


@every_method
@every_toy
def test_outputs_and_all_gradients_are_those_of_the_dense_weights(name: str, method: str) -> None:
    model, plain = converted(name, method)
    assert set(TOYS[name].names) <= set(matrices(model))
    trained = [t for layer in matrices(model).values() for t in layer.core.trained().values()]
    before = {n: p.clone() for n, p in plain.named_parameters()}
    for training in (True, False):
        model.train(training)
        plain.train(training)
        x = inputs().requires_grad_()
        output, wanted = model(x), torch.func.functional_call(plain, dense(model), (x,))
        assert (wanted - plain(x)).abs().max() > 1e-4
        torch.testing.assert_close(output, wanted, rtol=1e-10, atol=1e-12)
        for own, theirs in zip(gradients(output, [x, *trained]), gradients(wanted, [x, *trained]), strict=True):
            torch.testing.assert_close(own, theirs, rtol=1e-9, atol=1e-11)
    own = dict(model.named_parameters())
    for key, value in before.items():  # W is left as it is, and frozen
        assert torch.equal(own[key], value)
        assert not own[key].requires_grad
        assert own[key].grad is None


@every_toy
def test_evaluation_without_gradients(name: str) -> None:
    """Where torch has paths that read weights directly: in evaluation, without gradients, with padding."""
    model, plain = converted(name, "lora")
    model.eval()
    plain.eval()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            wanted = torch.func.functional_call(plain, {k: v.detach() for k, v in dense(model).items()}, (inputs(),))
            torch.testing.assert_close(model(inputs()), wanted, rtol=1e-9, atol=1e-10)
            assert not torch.allclose(plain(inputs()), wanted)


@every_method
@one_router
def test_merged_unmerged_and_disabled(name: str, method: str) -> None:
    model, plain = converted(name, method, torch.float32)
    plain.requires_grad_(False)
    before, wanted = {k: v.clone() for k, v in model.state_dict().items()}, model(inputs(torch.float32))
    with disable_adapter(model):
        assert torch.equal(model(inputs(torch.float32)), plain(inputs(torch.float32)))
    merge(model)
    torch.testing.assert_close(model(inputs(torch.float32)), wanted, rtol=1e-3, atol=1e-4)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    unmerge(model)
    assert torch.equal(model(inputs(torch.float32)), wanted)
    fresh = made(name, torch.float32, seed=5)
    fresh.load_state_dict(merged_state_dict(model))
    torch.testing.assert_close(fresh(inputs(torch.float32)), wanted, rtol=1e-3, atol=1e-4)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_training_a_merged_module_is_refused() -> None:
    model, _ = converted("attention", "lora", torch.float32)
    merge(model)
    with pytest.raises(RuntimeError, match=r"the model is merged.*Call unmerge\(model\)"):
        model(inputs(torch.float32).requires_grad_()).sum().backward()


@pytest.mark.parametrize("method", ["lora", "pmss", "pmss columns=all", "hira", "bat"])
@one_router
@pytest.mark.parametrize("how", ["true", "autocast"])
def test_bfloat16_is_near_float32(name: str, method: str, how: str) -> None:
    size = 0.3 if not method.startswith("pmss") else 0.02

    def run(low: bool) -> tuple[Tensor, dict[str, Tensor]]:
        model, _ = converted(name, method, torch.float32)
        train(model, size=size)
        if low and how == "true":
            model.bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=low and how == "autocast"):
            output = model(inputs(torch.bfloat16 if low and how == "true" else torch.float32)).float()
        weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(9))
        (output * weight).sum().backward()
        return output.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}  # type: ignore[misc]

    (output, found), (wanted, grads) = run(True), run(False)
    assert torch.dist(output, wanted) < 0.1 * wanted.norm()
    for key, gradient in found.items():
        assert gradient.dtype == torch.float32, key
        assert torch.dist(gradient, grads[key]) < 0.2 * grads[key].norm() + 1e-4, key


@one_router
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_gives_the_same(name: str, reentrant: bool) -> None:
    model, _ = converted(name, "pmss")
    trained = [t for layer in matrices(model).values() for t in layer.core.trained().values()]
    x = inputs().requires_grad_()
    wanted = gradients(model(x), [x, *trained])
    output = checkpoint(model, x, use_reentrant=reentrant)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(9), dtype=output.dtype)
    (output * weight).sum().backward()
    for own, theirs in zip([x.grad, *(t.grad for t in trained)], wanted, strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("config", [LoRAConfig, PMSSConfig])
def test_beside_converted_layers_and_experts(config: Any) -> None:
    """Of one model: attention, all experts and the routers."""
    model = made("mixtral").model
    ids = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(3))
    convert(model, config(rank=3, target_parameters=["gate.weight"]))
    train(model)
    assert set(matrices(model)) == {f"model.layers.{i}.mlp.gate.weight" for i in (0, 1)}
    wanted = model(ids).logits
    state = merged_state_dict(model)
    fresh = made("mixtral", seed=4).model
    fresh.load_state_dict(state)
    torch.testing.assert_close(fresh(ids).logits, wanted, rtol=1e-8, atol=1e-9)
    routers = model(ids, output_router_logits=True).router_logits
    for own, theirs in zip(routers, fresh(ids, output_router_logits=True).router_logits, strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-8, atol=1e-9)


def test_an_error_in_the_forward_pass_leaves_the_parameter() -> None:
    model, _ = converted("attention", "lora")
    weight = model.attention.in_proj_weight
    with pytest.raises((RuntimeError, AssertionError)):
        model(torch.randn(2, 3, 5, dtype=torch.float64))
    assert model.attention.in_proj_weight is weight
    assert isinstance(weight, nn.Parameter)
    model(inputs())
