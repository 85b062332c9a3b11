"""Fused experts with adapters compute what the dense W' of each expert computes: outputs and all gradients, in float64.

The reference is transformers' own loop over experts with ``W + delta(W)`` of each in its parameters, made by autograd from the
same trained tensors.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_pmss import AdapterConfig, convert, merge, unmerge
from lightning_pmss.conversion.convert import adapted_layers
from lightning_pmss.layers.experts import AdaptedExperts
from tests.experts.toys import MIXTURES, SIZES, experts_of, mixture, tokens, train
from tests.methods.cases import CASES

ARCHITECTURES = list(MIXTURES)
every_method = pytest.mark.parametrize("method", list(CASES))
every_mixture = pytest.mark.parametrize("name", ARCHITECTURES)


def of_experts(method: str, **options: Any) -> AdapterConfig:
    """Options that convert the experts alone."""
    defaults = {"target_modules": [], "target_parameters": ["gate_up_proj", "down_proj"], "rank": 4}
    return CASES[method](**defaults | options)


def converted(name: str, method: str, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    model = mixture(name, dtype, experts_implementation="eager")
    convert(model, of_experts(method, **options))
    return train(model)


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, their experts and the weights of these; the last expert gets none."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(13, SIZES["hidden_size"], generator=generator, dtype=torch.float64)
    chosen = torch.stack([torch.randperm(3, generator=generator)[:2] for _ in range(13)])
    weights = torch.rand(13, 2, generator=generator, dtype=torch.float64)
    return x.to(dtype).requires_grad_(), chosen, weights.to(dtype).requires_grad_()


def dense(model: Any, name: str, experts: Any, args: tuple[Tensor, ...]) -> Tensor:
    """transformers' loop with W' of each expert."""
    layers, own = adapted_layers(model), {}
    for key in ("gate_up_proj", "down_proj"):
        changed = []
        for i in range(4):
            layer = layers[f"{name}.{key}.{i}"]
            weight = layer.weight.detach()
            changed.append(weight + layer.update().delta(weight))
        stack = torch.stack(changed)
        own[key] = stack.mT if experts.is_transposed else stack
    plain = copy.copy(experts)
    plain.__class__ = experts.base_class
    answer: Tensor = torch.func.functional_call(plain, own, args, strict=False)
    return answer


def gradients(output: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(9), dtype=output.dtype)
    return list(torch.autograd.grad((output * weight).sum(), leaves, allow_unused=False))


@every_method
@every_mixture
def test_outputs_and_all_gradients_are_those_of_the_dense_weights(name: str, method: str) -> None:
    model = converted(name, method)
    full, experts = experts_of(model)[-1]
    assert isinstance(experts, AdaptedExperts)
    args = batch()
    trained = [t for stack in experts.stacks().values() for t in stack.core.trained().values()]
    assert trained
    leaves = [args[0], args[2], *trained]
    output, wanted = experts(*args), dense(model, full, experts, args)
    base = experts.base_class.forward(experts, *args)
    assert (wanted - base).abs().max() > 1e-3
    torch.testing.assert_close(output, wanted, rtol=1e-10, atol=1e-12)
    for own, theirs in zip(gradients(output, leaves), gradients(wanted, leaves), strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-9, atol=1e-11)
    for tensor, gradient in zip(trained, gradients(experts(*args), trained), strict=True):
        assert gradient.shape == tensor.shape
        assert not gradient[3].any()  # no token came to this expert
        assert gradient[:3].flatten(1).any(1).all()


@every_method
@every_mixture
def test_a_whole_model_answers_as_merged_and_comes_back_bit_for_bit(name: str, method: str) -> None:
    model = mixture(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    ids = tokens()
    plain = model(ids).logits
    convert(model, CASES[method](rank=4))
    started = model(ids).logits
    torch.testing.assert_close(started, plain, rtol=1e-4, atol=1e-5)
    train(model)
    wanted = model(ids).logits
    assert (wanted - plain).abs().max() > 1e-3
    merge(model)
    torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-3, atol=1e-4)
    unmerge(model)
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in before.items())
