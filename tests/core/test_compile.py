"""``torch.compile(fullgraph=True)``: equal to eager, compiled once for all steps."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from dense import EDITS, MEMORIES, pmss_layer, random_like, relative
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from lightning_pmss import PMSSConfig, convert


def _model(kind: str, edit: str, memory: str = "keep", dropout: float = 0.0, **more: Any) -> nn.Sequential:
    layers = [
        pmss_layer(kind, 12, 12, 4, dtype=torch.float32, edit=edit, memory=memory, dropout=dropout, seed=s, **more)
        for s in (0, 1)
    ]
    return nn.Sequential(layers[0], nn.GELU(), layers[1])


def _steps(call: Any, model: nn.Module, x: Tensor, *, autocast: bool = False, steps: int = 3) -> list[Tensor]:
    """Losses and gradients of x over training steps of AdamW; U changes between them."""
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2
    start = [p.detach().clone() for p in trained]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    found = []
    torch.manual_seed(0)
    for _ in range(steps):
        x = x.detach().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = call(x).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert x.grad is not None
        found += [loss.detach(), x.grad]
        optimizer.step()
    found += [p.detach().clone() for p in trained]
    assert all(not torch.equal(a, b) for a, b in zip(start, trained, strict=True))
    with torch.no_grad():
        for p, value in zip(trained, start, strict=True):
            p.copy_(value)
    return found


def _compare(model: nn.Module, x: Tensor, backend: str, tolerance: float, **options: Any) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    actual = _steps(compiled, model, x, **options)
    assert counter.frame_count == 1, f"compiled {counter.frame_count} times"
    expected = _steps(model, model, x, **options)
    differences = [relative(a, b) for a, b in zip(actual, expected, strict=True)]
    assert max(differences) <= tolerance, differences


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("edit", EDITS)
def test_steps_equal_eager_without_recompiling(edit: str, memory: str, dropout: float) -> None:
    model = _model("linear", edit, memory, dropout)
    _compare(model, random_like(3, 5, 12, dtype=torch.float32), "aot_eager", 1e-6)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("coordinates", ["raw", "spectral", "rotation"])
def test_other_coordinates_and_layouts(kind: str, coordinates: str) -> None:
    model = _model(kind, "output", coordinates=coordinates)
    _compare(model, random_like(5, 12, dtype=torch.float32), "aot_eager", 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("edit", ["auto", "weight"])
def test_llama_blocks_in_one_graph(edit: str) -> None:
    """All seven linear layers of two blocks, no graph break, one compilation over steps of an optimizer."""
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=8, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    model = LlamaModel(config)
    assert len(convert(model, PMSSConfig(rank=4, edit=edit)).layers) == 14
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x: model(inputs_embeds=x).last_hidden_state, fullgraph=True, backend=counter)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for seed in range(3):
        x = random_like(2, 6, 32, dtype=torch.float32, seed=seed).requires_grad_()
        found = torch.autograd.grad(compiled(x).square().sum(), [x, *trained])
        expected = torch.autograd.grad(model(inputs_embeds=x).last_hidden_state.square().sum(), [x, *trained])
        assert max(relative(a, b) for a, b in zip(found, expected, strict=True)) < 1e-4
        for parameter, grad in zip(trained, found[1:], strict=True):
            parameter.grad = grad
        optimizer.step()
    assert counter.frame_count == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    assert not torch._dynamo.utils.counters["recompiles"]


@pytest.mark.parametrize("edit", EDITS)
def test_under_autocast(edit: str) -> None:
    """The compiled backward of V runs under autocast as well (torch traces it so): equal within bfloat16."""
    _compare(_model("linear", edit), random_like(5, 12, dtype=torch.float32), "aot_eager", 0.02, autocast=True)


def test_recompiles_once_for_evaluation_and_never_again() -> None:
    torch._dynamo.reset()
    model = _model("linear", "output", dropout=0.3)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    x = random_like(5, 12, dtype=torch.float32)
    for _ in range(3):
        model.train()
        compiled(x)
        model.eval()
        assert relative(compiled(x), model(x)) < 1e-6
    assert counter.frame_count == 2


def test_the_count_can_fail() -> None:
    """A float in Python that changes from step to step is what recompiles."""
    model = _model("linear", "output")
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for memory in ("keep", "regather"):
        model[0].memory = memory
        compiled(random_like(5, 12, dtype=torch.float32))
    assert counter.frame_count == 2


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="inductor needs a C++ compiler")
def test_inductor() -> None:
    model = _model("linear", "input")
    model[2] = _model("linear", "output")[2]
    _compare(model, random_like(3, 5, 12, dtype=torch.float32), "inductor", 1e-5)
