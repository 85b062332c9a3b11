"""`SAM` and `BSAM` against NumPy: the points of the passes, the final gradient, and what the base optimizer owns."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_pmss.optimizers import BSAM, SAM, SharpnessAware

STEPS, LR, MOMENTUM = 5, 0.1, 0.9
SGD = functools.partial(torch.optim.SGD, lr=LR, momentum=MOMENTUM)
DRAW = np.random.default_rng(0)
INPUTS, TARGETS = DRAW.normal(size=(STEPS, 6, 4)), DRAW.normal(size=(STEPS, 6, 3))
FIRST, SECOND = DRAW.normal(size=(5, 4)), DRAW.normal(size=(3, 5))


class Reference:
    """A network of two matrices without autograd: the mean square of ``tanh(x A^T) B^T - y``; momentum SGD."""

    def __init__(self) -> None:
        self.w = [FIRST.copy(), SECOND.copy()]
        self.momentum = [np.zeros_like(FIRST), np.zeros_like(SECOND)]

    def gradients(self, w: list[np.ndarray], step: int) -> list[np.ndarray]:
        hidden = np.tanh(INPUTS[step] @ w[0].T)
        error = 2 * (hidden @ w[1].T - TARGETS[step]) / TARGETS[step].size
        return [((error @ w[1]) * (1 - hidden**2)).T @ INPUTS[step], error.T @ hidden]

    def step(self, number: int, kind: str, rho: float = 0.05, rho_min: float = 0.05, lr: float = LR) -> None:
        g = self.gradients(self.w, number)
        h = [part / (_norm(g) + 1e-12) for part in g]
        final = upper = self.gradients([w + rho * part for w, part in zip(self.w, h, strict=True)], number)
        start = self.w
        if kind != "sam":
            below = [w - rho_min * part for w, part in zip(self.w, h, strict=True)]
            lower = self.gradients(below, number)
            factor = _norm(upper) / _norm(lower)
            final = [a + b - factor * c for a, b, c in zip(upper, g, lower, strict=True)]
            start = below if kind == "published" else self.w
        self.momentum = [MOMENTUM * m + part for m, part in zip(self.momentum, final, strict=True)]
        self.w = [w - lr * m for w, m in zip(start, self.momentum, strict=True)]


def _norm(values: list[np.ndarray]) -> float:
    return float(np.sqrt(sum((value**2).sum() for value in values)))


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False)).to(dtype)
    with torch.no_grad():
        model[0].weight.copy_(torch.from_numpy(FIRST))
        model[2].weight.copy_(torch.from_numpy(SECOND))
    return model


def loss_of(model: nn.Module, number: int) -> Tensor:
    dtype = next(model.parameters()).dtype
    x, y = torch.from_numpy(INPUTS[number]).to(dtype), torch.from_numpy(TARGETS[number]).to(dtype)
    return (model(x) - y).square().mean()


def closure_of(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, number)
        loss.backward()
        return loss

    return closure


def check(model: nn.Sequential, reference: Reference) -> None:
    for weight, expected in zip((model[0].weight, model[2].weight), reference.w, strict=True):
        np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "kind", "options"),
    [
        (functools.partial(SAM), "sam", {}),
        (functools.partial(SAM, rho=0.5), "sam", {"rho": 0.5}),
        (functools.partial(BSAM), "bsam", {}),
        (functools.partial(BSAM, rho_max=0.3), "bsam", {"rho": 0.3}),
        (functools.partial(BSAM, rho_min=0.2), "bsam", {"rho_min": 0.2}),
        (functools.partial(BSAM, published=True), "published", {}),
    ],
)
def test_equals_the_reference(make: Any, kind: str, options: dict[str, float]) -> None:
    model, reference = network(), Reference()
    optimizer = make(model.parameters(), SGD)
    for number in range(STEPS):
        loss = optimizer.step(closure_of(model, optimizer, number))
        hidden = np.tanh(INPUTS[number] @ reference.w[0].T)
        assert loss.item() == pytest.approx(((hidden @ reference.w[1].T - TARGETS[number]) ** 2).mean(), rel=1e-10)
        reference.step(number, kind, **options)  # the loss above is the one before the step
        check(model, reference)


@pytest.mark.parametrize("follows", [True, False])
def test_rho_min_follows_the_learning_rate(follows: bool) -> None:
    model, reference = network(), Reference()
    optimizer = BSAM(model.parameters(), SGD, rho_min_follows_lr=follows)
    factors = [0.25, 0.5, 1.0, 0.5, 0.1]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factors[min(step, STEPS - 1)])
    for number, factor in enumerate(factors):
        optimizer.step(closure_of(model, optimizer, number))
        scheduler.step()
        reference.step(number, "bsam", rho_min=0.05 * (factor if follows else 1.0), lr=LR * factor)
        check(model, reference)


def test_rho_min_follows_a_cycle_that_begins_low() -> None:
    model = network()
    optimizer = BSAM(model.parameters(), SGD)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.4, total_steps=10, cycle_momentum=False)
    found = []
    for _ in range(4):
        found.append(optimizer._rho_min() / optimizer.param_groups[0]["lr"])
        optimizer.step(closure_of(model, optimizer, 0))
        scheduler.step()
    assert found == pytest.approx([0.05 / 0.4] * 4)


@pytest.mark.parametrize("make", [SAM, BSAM])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_optimizer_steps_from_the_same_bits(make: Any, dtype: torch.dtype) -> None:
    model = network(dtype)
    optimizer = make(model.parameters(), functools.partial(torch.optim.SGD, lr=0.0))
    before = [p.detach().clone() for p in model.parameters()]
    points: list[list[Tensor]] = []

    def closure() -> Tensor:
        points.append([p.detach().clone() for p in model.parameters()])
        return closure_of(model, optimizer, 0)()

    optimizer.step(closure)
    assert len(points) == make.passes
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    for number, point in enumerate(points[1:]):
        distance = torch.cat([(a - b).double().flatten() for a, b in zip(point, before, strict=True)]).norm()
        assert float(distance) == pytest.approx(0.05, rel=1e-3 if dtype == torch.float32 else 0.3), number


def test_gradients_that_a_reducer_keeps_in_one_buffer() -> None:
    """As under DDP with ``gradient_as_bucket_view``: the gradient of a pass lies where that of the last one lay."""
    usual, model = network(), network()
    for one in (usual, model):
        optimizer = BSAM(one.parameters(), SGD)
        buffers = [torch.zeros_like(p) for p in one.parameters()]

        def closure(one: Any = one, buffers: list[Tensor] = buffers) -> Tensor:
            loss = loss_of(one, 0)
            for p, buffer, g in zip(
                one.parameters(), buffers, torch.autograd.grad(loss, list(one.parameters())), strict=True
            ):
                p.grad = buffer.copy_(g) if one is model else g
            return loss

        optimizer.step(closure)
    for a, b in zip(usual.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_exception_in_a_pass_leaves_the_weights() -> None:
    model = network()
    optimizer = BSAM(model.parameters(), SGD, published=True)
    before = [p.detach().clone() for p in model.parameters()]
    calls = []

    def closure() -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return closure_of(model, optimizer, 0)()

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not optimizer.state


@pytest.mark.parametrize("make", [SAM, BSAM])
def test_a_zero_gradient_changes_nothing(make: Any) -> None:
    model = network()
    optimizer = make(model.parameters(), functools.partial(torch.optim.SGD, lr=LR))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = 0.0 * loss_of(model, 0)
        loss.backward()
        return loss

    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step(closure)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("make", [SAM, BSAM])
def test_infinite_gradients_reach_the_final_one_and_no_weight(make: Any) -> None:
    for broken in range(make.passes):
        model = network()
        optimizer = make(model.parameters(), SGD)
        before = [p.detach().clone() for p in model.parameters()]
        calls: list[int] = []

        def replay(broken: int = broken, model: Any = model, calls: list[int] = calls) -> None:
            loss_of(model, 0).backward()
            if len(calls) == broken:
                model[0].weight.grad[0, 0] = float("inf")
            calls.append(1)

        replay()
        optimizer.complete(replay)
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert not model[0].weight.grad.isfinite().all()


@pytest.mark.parametrize("same", [True, False])
def test_dropout_of_the_passes(same: bool) -> None:
    model = network()
    optimizer = BSAM(model.parameters(), SGD, same_dropout=same)
    masks = []
    torch.manual_seed(3)

    def closure() -> Tensor:
        masks.append(torch.nn.functional.dropout(torch.ones(64), 0.5))
        return closure_of(model, optimizer, 0)()

    optimizer.step(closure)
    assert [torch.equal(mask, masks[0]) for mask in masks] == [True, same, same]
    after = torch.rand(1)
    torch.manual_seed(3)
    torch.nn.functional.dropout(torch.ones(64), 0.5)
    assert torch.equal(torch.rand(1), after) is same  # the process draws on as if there had been one pass


def test_parameters_without_a_gradient_in_some_pass() -> None:
    a, b, unused = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(3))
    optimizer = BSAM([a, b, unused], functools.partial(torch.optim.SGD, lr=1.0))
    calls: list[int] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (a if len(calls) % 2 == 0 else b).square().sum()
        calls.append(1)
        loss.backward()
        return loss

    optimizer.step(closure)
    h = 0.5**0.5
    lower = 2 * (1 - 0.05 * h)
    factor = 2.0 / lower  # b's gradient in the second pass has the norm 2 sqrt 2
    np.testing.assert_allclose(a.detach().numpy(), 1 - (2 - factor * lower), atol=1e-12)
    np.testing.assert_allclose(b.detach().numpy(), -1.0)
    assert torch.equal(unused.detach(), torch.ones(2, dtype=torch.float64))


def test_a_process_without_gradients_takes_part_in_all_passes() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = BSAM([p], SGD)
    calls: list[int] = []
    optimizer.step(lambda: calls.append(1))
    assert len(calls) == 3
    assert torch.equal(p.detach(), torch.ones(2))


def test_state_groups_and_hooks_are_the_base_optimizers() -> None:
    model = network()
    optimizer = SAM(model.parameters(), torch.optim.AdamW)
    base: Any = optimizer.base_optimizer
    optimizer.step(closure_of(model, optimizer, 0))
    assert optimizer.state is base.state
    assert optimizer.param_groups is base.param_groups
    assert set(optimizer.state_dict()) == set(torch.optim.AdamW(network().parameters()).state_dict())
    extra = nn.Parameter(torch.ones(1))
    optimizer.add_param_group({"params": [extra], "lr": 0.5})
    assert base.param_groups[1]["lr"] == 0.5
    other_model = network()
    other = SAM(other_model.parameters(), torch.optim.AdamW)
    other.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.state is other.base_optimizer.state  # type: ignore[union-attr]
    assert other.param_groups is other.base_optimizer.param_groups  # type: ignore[union-attr]
    assert other.param_groups[1]["lr"] == 0.5
    with torch.no_grad():
        for p, q in zip(model.parameters(), other_model.parameters(), strict=True):
            q.copy_(p)
    optimizer.step(closure_of(model, optimizer, 1))
    other.step(closure_of(other_model, other, 1))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other_model.parameters(), strict=True))


def test_a_step_without_a_closure() -> None:
    model = network()
    optimizer = SAM(model.parameters(), torch.optim.AdamW)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()  # as the loaders of sharded checkpoints do, to make the state
    assert len(optimizer.state) == 2
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match=r"SAM.step\(\) needs a closure .* 2 passes: `optimizer.step\(closure\)`"):
        optimizer.step()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda p: SAM(p, rho=0.0), ValueError, "SAM: rho=0.0 must be a positive number, such as 0.05"),
        (lambda p: SAM(p, rho=float("nan")), ValueError, "rho=nan"),
        (lambda p: BSAM(p, rho_max=-1), ValueError, "BSAM: rho_max=-1 must be"),
        (lambda p: BSAM(p, rho_min="0.1"), ValueError, "BSAM: rho_min='0.1' must be"),
        (lambda p: SAM(p, torch.optim.SGD(p)), TypeError, "must make an optimizer from parameters, such as SAM"),
        (lambda p: SAM(p, lambda params: None), TypeError, "made NoneType, no torch optimizer. Type SAM"),
        (lambda p: SAM(p, SAM), ValueError, "base_optimizer=SAM runs passes of its own"),
        (lambda p: BSAM(p, torch.optim.LBFGS), ValueError, "base_optimizer=LBFGS runs passes"),
    ],
)
def test_what_is_refused(make: Callable[[Any], SharpnessAware], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make([nn.Parameter(torch.ones(2))])


def test_sparse_gradients_are_refused() -> None:
    table = nn.Embedding(5, 2, sparse=True)
    optimizer = SAM(table.parameters(), torch.optim.SGD)

    def closure() -> Tensor:
        loss = table(torch.tensor([1])).sum()
        loss.backward()
        return loss

    with pytest.raises(ValueError, match="SAM adds gradients to parameters and cannot use sparse ones"):
        optimizer.step(closure)
