"""Grouped products: torch's kernel and the product of each expert agree, and what a pass keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_pmss import convert
from lightning_pmss.layers import grouped
from lightning_pmss.layers.grouped import Groups
from tests.experts.toys import SIZES, experts_of, mixture, train
from tests.methods.cases import CASES

CHOSEN = torch.tensor([[3, 0], [0, 5], [3, 0], [0, 3], [5, 3]])  # experts 1, 2 and 4 get nothing


def both(run: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Tensor], list[Tensor]]:
    """With torch's kernel, which serves CPUs in float32, and without."""
    asked: list[int] = []
    monkeypatch.setattr(grouped, "_has_kernel", lambda *_: asked.append(1) is None)
    first = run()
    assert asked
    monkeypatch.setattr(grouped, "_has_kernel", lambda *_: False)
    return first, run()


def test_the_kernel_and_the_products_of_each_expert_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(10, 16, generator=generator, requires_grad=True)
    matrices = torch.randn(6, 8, 16, generator=generator, requires_grad=True)
    stored = torch.randn(6, 16, 8, generator=generator).mT  # as gpt-oss keeps it
    weight = torch.randn(10, 8, generator=generator)

    def run() -> list[Tensor]:
        groups = Groups(CHOSEN, 6)
        y = groups.linear(x, matrices) + groups.linear(x, stored)
        return [y, *torch.autograd.grad((y * weight).sum(), [x, matrices])]

    first, second = both(run, monkeypatch)
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert not first[2][[1, 2, 4]].any()
    ids = CHOSEN.flatten().sort().values
    torch.testing.assert_close(second[0], torch.einsum("soi,si->so", (matrices + stored)[ids], x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "pmss", "pmss columns=all", "miss", "bat"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_whole_experts_with_the_kernel(name: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mixture(name)
    convert(model, CASES[method](rank=8))
    train(model, size=0.05)
    _, experts = experts_of(model)[0]
    x = torch.randn(9, SIZES["hidden_size"], generator=torch.Generator().manual_seed(1), requires_grad=True)
    chosen, weights = torch.tensor([[0, 2]] * 4 + [[2, 1]] * 5), torch.full((9, 2), 0.5)
    trained = [t for stack in experts.stacks().values() for t in stack.core.trained().values()]

    def run() -> list[Tensor]:
        output = experts(x, chosen, weights)
        return [output, *torch.autograd.grad(output.square().sum(), [x, *trained])]

    for one, other in zip(*both(run, monkeypatch), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def kept(experts: Any, tokens: int, hidden: int) -> int:
    """Elements of floating-point tensors that a pass keeps for its backward pass, without parameters."""
    own = {p.untyped_storage().data_ptr() for p in experts.parameters()}
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes() // 4
        return tensor

    x = torch.randn(tokens, hidden, requires_grad=True)
    chosen = torch.stack([torch.randperm(4)[:2] for _ in range(tokens)])
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = experts(x, chosen, torch.ones(tokens, 2))
    del output
    return sum(found.values())


@pytest.mark.parametrize("method", ["pmss", "pmss columns=all", "miss", "lora_xs", "curlora"])
def test_the_input_of_experts_is_not_kept(method: str) -> None:
    """Beyond what the activation between both products keeps, there are a few numbers per rank for each pair."""
    tokens, hidden, inner, rank = 200, SIZES["hidden_size"], SIZES["intermediate_size"], 4

    def keeps(kind: str) -> int:
        torch.manual_seed(0)
        model = mixture("mixtral")
        convert(model, CASES[kind](rank=rank, target_modules=[], target_parameters=["gate_up_proj", "down_proj"]))
        return kept(experts_of(model)[0][1], tokens, hidden)

    pairs = 2 * tokens
    small = keeps(method)
    assert keeps("lora") - small > 0.9 * pairs * (hidden + inner) - 4 * rank * pairs
    assert small < pairs * (4 * inner + hidden) + pairs * 6 * rank + 4 * 4 * rank * (3 * inner + 2 * hidden)


@pytest.mark.parametrize("method", list(CASES))
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_of_the_weights_the_parameter_itself_is_kept(name: str, method: str) -> None:
    """A view would keep the memory that ZeRO-3 gathers for the forward pass until the backward pass."""
    model = mixture(name)
    convert(model, CASES[method](rank=4))
    _, experts = experts_of(model)[0]
    own = {p.untyped_storage().data_ptr(): p.shape for p in experts.parameters(recurse=False)}
    seen: list[tuple[torch.Size, torch.Size]] = []

    def note(tensor: Tensor) -> Tensor:
        if (shape := own.get(tensor.untyped_storage().data_ptr())) is not None:
            seen.append((tensor.shape, shape))
        return tensor

    x = torch.randn(9, SIZES["hidden_size"], requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        experts(x, torch.tensor([[0, 2]] * 9), torch.ones(9, 2)).sum()
    assert seen
    assert all(shape == whole for shape, whole in seen), seen
