"""Low precision against float32: bfloat16 layers, autocast, large biases, small updates.

The update part of an output is ``dy = y(U) - y(0)``. Two figures say how much of it survives: the gain
``<dy, exact> / <exact, exact>`` (1: nothing is lost on average) and the relative error.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from dense import COORDINATES, EDITS, KINDS, dense_weight, gain, pmss_layer, random_like, relative, update
from torch import Tensor, nn

from lightning_pmss.methods.pmss.layer import PMSSLinear

TOKENS = 400
WIDTH, RANK = 64, 16
BF16 = torch.bfloat16


class Mode(NamedTuple):
    """How a step is run: dtypes of the weights and of x, and autocast to bfloat16."""

    weights: torch.dtype
    x: torch.dtype
    autocast: bool

    def context(self) -> Any:
        return torch.autocast("cpu", BF16) if self.autocast else nullcontext()


PURE = Mode(BF16, BF16, False)
AUTOCAST = Mode(torch.float32, torch.float32, True)
MODES = {"pure": PURE, "autocast": AUTOCAST, "autocast, weights bf16": Mode(BF16, torch.float32, True)}


def _layer(edit: str, mode: Mode = PURE, **options: Any) -> PMSSLinear:
    options = {"out": WIDTH, "inp": WIDTH, "rank": RANK, "bias": None, "kind": "linear"} | options
    return pmss_layer(dtype=mode.weights, edit=edit, **options)


def _x(mode: Mode, inp: int = WIDTH) -> Tensor:
    return random_like(TOKENS, inp).to(BF16).to(mode.x)  # one set of values in every dtype


def _update_part(layer: PMSSLinear, x: Tensor, mode: Mode) -> Tensor:
    with torch.no_grad(), mode.context():
        trained = layer(x).double()
    bare = copy.deepcopy(layer)
    with torch.no_grad():
        bare.core.weight.zero_()
    with torch.no_grad(), mode.context():
        return trained - bare(x).double()


def _measure(layer: PMSSLinear, mode: Mode) -> tuple[float, float]:
    x = _x(mode)
    exact = x.double() @ update(layer).T
    part = _update_part(layer, x, mode)
    return gain(part, exact), relative(part, exact)


def _gradients(layer: PMSSLinear, x: Tensor, mode: Mode) -> dict[str, Tensor]:
    x = x.detach().clone().requires_grad_()
    loss = random_like(TOKENS, *layer.base_weight().shape[:1], seed=3).to(BF16)
    with mode.context():
        y = layer(x)
    grads = torch.autograd.grad(y, [x, layer.core.weight], loss.to(y.dtype))
    return {"y": y.detach(), "x": grads[0], "V": grads[1]}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize(("out", "inp", "rank"), [(64, 64, 16), (48, 80, 16), (80, 48, 16), (37, 51, 7)])
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_against_float32(
    kind: str, edit: str, out: int, inp: int, rank: int, coordinates: str, mode: str
) -> None:
    low = MODES[mode]
    layer = _layer(edit, low, kind=kind, out=out, inp=inp, rank=rank, coordinates=coordinates, bias=1.0)
    x = _x(low, inp)
    found = _gradients(layer, x, low)
    wide = Mode(torch.float32, torch.float32, False)
    exact = _gradients(copy.deepcopy(layer).float(), x.float(), wide)
    errors = {key: relative(found[key], exact[key]) for key in exact}
    # Orthonormal V: its gradient passes through the inverse factors, which multiply rounding by their condition number.
    assert errors["y"] < 0.01, errors
    assert errors["x"] < 0.01, errors
    assert errors["V"] < (0.04 if coordinates == "orthonormal" else 0.01), errors
    assert found["V"].dtype == torch.float32
    assert found["x"].dtype == low.x


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("edit", EDITS)
def test_biases_a_hundred_times_the_output(edit: str, mode: str) -> None:
    """h must be gathered before the bias: with it, h in bfloat16 would be off by 17 %, and with h the gradient of V."""
    low = MODES[mode]
    layer = _layer(edit, low, bias=100.0)
    x = _x(low)
    found = _gradients(layer, x, low)
    exact = _gradients(copy.deepcopy(layer).float(), x.float(), Mode(torch.float32, torch.float32, False))
    assert relative(found["V"], exact["V"]) < 0.02
    assert relative(found["x"], exact["x"]) < 0.01
    assert relative(found["y"], exact["y"]) < 0.005
    # The output's own grid is 0.5 there: dy is noisy, but nothing of it may be lost on average.
    assert _measure(layer, low)[0] == pytest.approx(1, abs=0.05)


def test_gathering_behind_the_bias_would_be_seen() -> None:
    layer = _layer("output", bias=100.0)
    x = _x(PURE)
    y = nn.functional.linear(x, layer.weight, layer.bias)
    assert layer.bias is not None
    h = y[:, layer.rows] - layer.bias[layer.rows]
    assert relative(h, x.double() @ layer.weight_rows().double().T) > 0.1


# Measured (gain / relative error), alike in all modes, since the base rounds its input and its output to bfloat16 in each:
#   0.003 of |W|   output edit 0.93 / 0.48   input edit 1.00 / 0.79
#   0.03           output edit 1.00 / 0.06   input edit 1.00 / 0.08
#   0.3            output edit 1.00 / 0.01   input edit 1.00 / 0.01
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("size", [0.003, 0.03, 0.3])
def test_how_much_of_an_update_survives(edit: str, size: float, mode: str) -> None:
    found, error = _measure(_layer(edit, MODES[mode], size=size), MODES[mode])
    assert abs(found - 1) < {0.003: 0.12, 0.03: 0.01, 0.3: 0.005}[size], (found, error)
    assert error < {0.003: 1.0, 0.03: 0.12, 0.3: 0.03}[size], (found, error)


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("coordinates", COORDINATES)
def test_autocast_against_the_dense_layer_under_autocast(edit: str, coordinates: str) -> None:
    layer = _layer(edit, AUTOCAST, coordinates=coordinates, bias=1.0, out=48)
    x, loss = _x(AUTOCAST).requires_grad_(), random_like(TOKENS, 48, seed=3).to(BF16)
    v = layer.core.weight.detach().clone().requires_grad_()
    dense = dense_weight(layer, v)
    with torch.autocast("cpu", BF16):
        y, expected = layer(x), nn.functional.linear(x, dense, layer.bias)
    assert y.dtype == expected.dtype == BF16
    found = [y, *torch.autograd.grad(y, [x, layer.core.weight], loss)]
    reference = [expected, *torch.autograd.grad(expected, [x, v], loss)]
    errors = [relative(a, b) for a, b in zip(found, reference, strict=True)]
    assert max(errors[:2]) < 0.01, errors
    assert errors[2] < (0.04 if coordinates == "orthonormal" else 0.01), errors


def test_u_is_formed_in_float32_under_autocast() -> None:
    layer = _layer("output", AUTOCAST)
    expected = layer.core_update()
    with torch.autocast("cpu", BF16):
        update_part = layer.core_update()
    assert update_part.dtype == torch.float32
    assert torch.equal(update_part, expected)


@pytest.mark.parametrize("edit", EDITS)
def test_float64_stays_float64_under_autocast(edit: str) -> None:
    layer = pmss_layer(edit=edit, dropout=0.0)
    x = random_like(5, 10).requires_grad_()
    expected = torch.autograd.grad(layer(x).square().sum(), [x, layer.core.weight])
    with torch.autocast("cpu", BF16):
        y = layer(x)
    assert y.dtype == torch.float64
    found = torch.autograd.grad(y.square().sum(), [x, layer.core.weight])
    assert max(relative(a, b) for a, b in zip(found, expected, strict=True)) < 1e-14


@pytest.mark.parametrize("edit", EDITS)
def test_float16(edit: str) -> None:
    mode = Mode(torch.float16, torch.float16, False)
    layer = _layer(edit, mode, bias=1.0)
    x = _x(mode)
    exact = _gradients(copy.deepcopy(layer).float(), x.float(), Mode(torch.float32, torch.float32, False))
    found = _gradients(layer, x, mode)
    assert relative(found["y"], exact["y"]) < 0.002
    assert relative(found["x"], exact["x"]) < 0.002
    assert relative(found["V"], exact["V"]) < 0.01
    assert abs(_measure(layer, mode)[0] - 1) < 0.002


@pytest.mark.parametrize("edit", EDITS)
def test_training_in_bfloat16_follows_float32(edit: str) -> None:
    """Fifty steps of AdamW towards a target: the loss of the low-precision run must come down as far."""
    losses = {}
    for name, mode in {"float32": Mode(torch.float32, torch.float32, False), "bfloat16": PURE}.items():
        layer = _layer(edit, mode, size=0.0, bias=1.0)
        x = _x(mode)
        with torch.no_grad():
            target = layer(x).float() + 0.3 * x.float() @ random_like(WIDTH, WIDTH, seed=6).float() / WIDTH**0.5
        optimizer = torch.optim.AdamW([layer.core.weight], lr=0.02)
        for _ in range(50):
            loss = (layer(x).float() - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.setdefault(name, []).append(float(loss.detach()))
    assert losses["float32"][-1] < 0.97 * losses["float32"][0]
    fallen = [run[0] - run[-1] for run in losses.values()]
    assert fallen[1] == pytest.approx(fallen[0], rel=0.03)
