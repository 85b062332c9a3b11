"""The converted layer equals the dense ``W + s C U R``: forward and every gradient, in every form it comes in."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from dense import (
    COORDINATES,
    EDITS,
    KINDS,
    MEMORIES,
    adopted,
    base_layer,
    dense_weight,
    pmss_layer,
    random_like,
    relative,
    update,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_pmss.methods.pmss.coordinates import coordinate_frame
from lightning_pmss.methods.pmss.edits import InputEdit, Options, OutputEdit
from lightning_pmss.methods.pmss.layer import PMSSLinear
from lightning_pmss.methods.pmss.method import PMSSUpdate

SHAPES = {  # (out, in), rank
    "tall": ((24, 10), 6),
    "wide": ((10, 24), 6),
    "square": ((16, 16), 8),
    "odd": ((7, 13), 5),
    "rank 1": ((11, 9), 1),
    "full rank": ((6, 9), 6),
    "one row": ((1, 9), 1),
    "one column": ((9, 1), 1),
}
Gradients = dict[str, Tensor]


def _run(layer: PMSSLinear, x: Tensor, weight_of_loss: Tensor) -> Gradients:
    """Output and gradients of the layer for the loss ``sum(y * weight_of_loss)``."""
    x = x.detach().requires_grad_(x.requires_grad)
    leaves = {"x": x, "V": layer.core.weight, "bias": layer.bias}
    leaves = {k: t for k, t in leaves.items() if t is not None and t.requires_grad}
    y = layer(x)
    grads = torch.autograd.grad(y, list(leaves.values()), weight_of_loss.to(y.dtype))
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def _dense(layer: PMSSLinear, x: Tensor, weight_of_loss: Tensor) -> Gradients:
    """The same by the dense weight, in float64."""
    x = x.detach().double().requires_grad_(x.requires_grad)
    v = layer.core.weight.detach().double().requires_grad_()
    bias = None if layer.bias is None else layer.bias.detach().double().requires_grad_(layer.bias.requires_grad)
    wide = layer if layer.weight.dtype == torch.float64 else _in_float64(layer)
    leaves = {k: t for k, t in {"x": x, "V": v, "bias": bias}.items() if t is not None and t.requires_grad}
    y = x @ dense_weight(wide, v).T
    y = y if bias is None else y + bias
    grads = torch.autograd.grad(y, list(leaves.values()), weight_of_loss.double())
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def _in_float64(layer: PMSSLinear) -> PMSSLinear:
    return copy.deepcopy(layer).double()


def _assert_equal(actual: Gradients, expected: Gradients, tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for key, value in actual.items():
        assert value.shape == expected[key].shape, key
        assert relative(value, expected[key]) < tolerance, (key, relative(value, expected[key]))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_dense_layer(kind: str, edit: str, shape: str) -> None:
    """Bias (none, frozen, trained), memory modes, coordinates and dtypes are crossed within."""
    (out, inp), rank = SHAPES[shape]
    biases = (None, "frozen", "trained") if kind == "linear" else ("frozen", "trained")  # Conv1D always has one
    for bias, memory, coordinates in itertools.product(biases, MEMORIES, COORDINATES):
        if coordinates == "rotation" and rank == 1:
            continue  # refused: there is nothing to turn
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
            layer = pmss_layer(
                kind, out, inp, rank, bias=None if bias is None else 1.0, dtype=dtype,
                coordinates=coordinates, edit=edit, memory=memory, scale=0.7,
            )  # fmt: skip
            if bias == "trained":
                assert layer.bias is not None
                layer.bias.requires_grad_(True)
            x = random_like(5, inp, dtype=dtype).requires_grad_()
            loss = random_like(5, out, seed=3)
            expected = _dense(layer, x, loss)
            assert relative(expected["y"], x.double() @ layer.base_weight().double().T) > 0.02, "U must matter here"
            _assert_equal(_run(layer, x, loss), expected, tolerance)


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("shape", [(), (3,), (3, 5), (2, 3, 5), (1,)], ids=str)
def test_one_to_four_dimensions(edit: str, shape: tuple[int, ...]) -> None:
    layer = pmss_layer(out=12, inp=10, edit=edit)
    x = random_like(*shape, 10).requires_grad_()
    _assert_equal(_run(layer, x, random_like(*shape, 12)), _dense(layer, x, random_like(*shape, 12)), 1e-12)


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("kind", KINDS)
def test_non_contiguous_input(kind: str, edit: str) -> None:
    layer = pmss_layer(kind, out=12, inp=10, edit=edit)
    inputs = {
        "transposed": random_like(10, 6).T,
        "swapped": random_like(4, 10, 3).transpose(1, 2),
        "strided": random_like(4, 6, 20)[:, ::2, ::2],
        "expanded": random_like(1, 3, 10).expand(4, 3, 10),
        "one value": random_like(1, 1).expand(5, 10),
        "permuted": random_like(10, 2, 3, 4).permute(2, 3, 1, 0),
    }
    for name, x in inputs.items():
        assert not x.is_contiguous(), name
        before = x.clone()
        loss = random_like(*x.shape[:-1], 12)
        x = x.detach().requires_grad_()
        _assert_equal(_run(layer, x, loss), _dense(layer, x, loss), 1e-12)
        assert torch.equal(x, before), f"{name}: the input was changed"
        # a gradient that is not contiguous
        loss = random_like(12).expand(*x.shape[:-1], 12)
        _assert_equal(_run(layer, x, loss), _dense(layer, x, loss), 1e-12)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("shape", [(0,), (0, 7), (3, 0)])
def test_zero_tokens(edit: str, shape: tuple[int, ...], dropout: float) -> None:
    layer = pmss_layer(out=12, inp=10, edit=edit, dropout=dropout).train()
    x = random_like(*shape, 10).requires_grad_()
    y = layer(x)
    assert y.shape == (*shape, 12)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert layer.core.weight.grad is not None
    assert torch.count_nonzero(layer.core.weight.grad) == 0


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("function", [InputEdit, OutputEdit])
def test_gradcheck(function: Any, keep: bool, transposed: bool, masked: bool) -> None:
    out, inp = 7, 5
    weight = random_like(inp, out) if transposed else random_like(out, inp)
    rows, cols = torch.tensor([5, 0, 2]), torch.tensor([4, 1])
    mask = (random_like(6, 3, seed=9) > 0).double() * 2 if masked else None
    tokens = random_like(6, inp if function is InputEdit else out).requires_grad_()
    u = random_like(2, 3).requires_grad_()

    def run(tokens: Tensor, u: Tensor) -> Tensor:
        result: Tensor = function.apply(tokens, weight, None, u, rows, cols, mask, Options(False, keep, transposed))
        return result

    assert torch.autograd.gradcheck(run, (tokens, u))
    assert torch.autograd.gradcheck(lambda u: run(tokens.detach(), u), (u,))
    assert torch.autograd.gradcheck(lambda tokens: run(tokens, u.detach()), (tokens,))


@pytest.mark.parametrize("trained", ["x", "u", "bias", "x u", "x u bias"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("function", [InputEdit, OutputEdit])
def test_gradcheck_with_the_base_product(
    function: Any, keep: bool, transposed: bool, masked: bool, trained: str
) -> None:
    weight = random_like(5, 7) if transposed else random_like(7, 5)
    rows, cols = torch.tensor([5, 0, 2]), torch.tensor([4, 1])
    mask = (random_like(6, 3, seed=9) > 0).double() * 2 if masked else None
    parts = {"x": random_like(6, 5), "u": random_like(2, 3), "bias": random_like(7)}
    parts = {k: t.requires_grad_(k in trained.split()) for k, t in parts.items()}

    def run(x: Tensor, u: Tensor, bias: Tensor) -> Tensor:
        result: Tensor = function.apply(x, weight, bias, u, rows, cols, mask, Options(True, keep, transposed))
        return result

    assert torch.autograd.gradcheck(run, tuple(parts.values()))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("edit", EDITS)
def test_a_base_with_a_forward_of_its_own_gives_the_same(edit: str, memory: str, dropout: float) -> None:
    """The edits around a black box against those that hold the product themselves."""

    class Own(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input)

    found = []
    for kind in (nn.Linear, Own):
        base = kind(12, 12, bias=False, dtype=torch.float64).requires_grad_(False)
        base.weight.copy_(random_like(12, 12))
        layer = adopted(base, 4, edit=edit, memory=memory, dropout=dropout)
        with torch.no_grad():
            layer.core.weight.copy_(random_like(4, 4, seed=5))
        torch.manual_seed(3)
        found.append(_run(layer, random_like(2, 5, 12).requires_grad_(), random_like(2, 5, 12, seed=4)))
    _assert_equal(found[1], found[0], 1e-13)


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_that_is_trained_too_gets_its_gradient(kind: str, edit: str) -> None:
    """That of the base product; the slices are taken as constants."""
    layer = pmss_layer(kind, edit=edit)
    layer.weight.requires_grad_(True)
    layer(random_like(5, 10)).sum().backward()
    assert layer.weight.grad is not None
    assert torch.count_nonzero(layer.weight.grad) > 0


@pytest.mark.parametrize("edit", EDITS)
def test_second_derivatives_are_refused(edit: str) -> None:
    layer = pmss_layer(edit=edit)
    x = random_like(3, 10).requires_grad_()
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("edit", EDITS)
def test_input_without_gradient(edit: str) -> None:
    layer = pmss_layer(out=12, inp=10, edit=edit)
    x = random_like(5, 10)
    found = _run(layer, x, random_like(5, 12))
    assert set(found) == {"y", "V"}
    _assert_equal(found, _dense(layer, x, random_like(5, 12)), 1e-12)
    with torch.no_grad():
        assert not layer(x).requires_grad
    layer.core.weight.requires_grad_(False)  # frozen adapter: only x's gradient
    x.requires_grad_()
    grad = torch.autograd.grad(layer(x), x, random_like(5, 12))[0]
    assert relative(grad, _dense(layer, x, random_like(5, 12))["x"]) < 1e-12


@pytest.mark.parametrize("edit", EDITS)
def test_twice_in_one_forward(edit: str) -> None:
    layer = pmss_layer(out=10, inp=10, edit=edit)
    x = random_like(5, 10).requires_grad_()
    found = torch.autograd.grad(layer(layer(x).tanh()).square().sum(), [x, layer.core.weight])
    v = layer.core.weight.detach().clone().requires_grad_()
    dense, bias = dense_weight(layer, v), layer.bias
    once = nn.functional.linear(x, dense, bias).tanh()
    expected = torch.autograd.grad(nn.functional.linear(once, dense, bias).square().sum(), [x, v])
    assert max(relative(a, b) for a, b in zip(found, expected, strict=True)) < 1e-12


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("edit", EDITS)
def test_activation_checkpointing_gives_the_same_gradients(edit: str, memory: str, dropout: float) -> None:
    """With dropout, the recomputation must draw the same mask (``preserve_rng_state`` is torch's default)."""
    layer = pmss_layer(out=12, inp=10, edit=edit, memory=memory, dropout=dropout).train()
    x = random_like(5, 10).requires_grad_()

    def gradients(recompute: bool) -> list[Tensor]:
        torch.manual_seed(4)
        y = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        torch.manual_seed(99)
        return [y, *torch.autograd.grad(y.square().sum(), [x, layer.core.weight])]

    plain = gradients(False)
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(True), strict=True))
    assert torch.count_nonzero(plain[2]) > 0


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("kind", KINDS)
def test_scale_and_auto_edit(kind: str, edit: str) -> None:
    small, large = (pmss_layer(kind, edit=edit, scale=s, size=1.0, coordinates="raw") for s in (1.0, -3.0))
    with torch.no_grad():
        large.core.weight.copy_(small.core.weight)
    assert relative(large.core_update(), -3 * small.core_update()) < 1e-14
    tall, wide, square = (adopted(base_layer(kind, o, i), 3) for o, i in ((12, 9), (9, 12), (9, 9)))
    # Square: the edit whose slice of the stored tensor is contiguous.
    assert (tall.edit, wide.edit, square.edit) == ("input", "output", "output" if kind == "conv1d" else "input")


def test_a_base_that_hides_its_bias_takes_the_input_edit() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    layer = Doubled(12, 9).double()
    base = layer(random_like(4, 12)).detach()
    layer = adopted(layer, 3)
    assert layer.edit == "input"
    assert isinstance(layer, Doubled)
    assert relative(layer(random_like(4, 12)), base) < 1e-14
    with torch.no_grad():
        layer.core.weight.copy_(random_like(3, 3))
    expected = 2 * (random_like(4, 12) @ dense_weight(layer, layer.core.weight).T + layer.bias)
    assert relative(layer(random_like(4, 12)), expected) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_orthonormal_coordinates_keep_the_norm(kind: str) -> None:
    layer = pmss_layer(kind, 24, 15, 6)
    assert float(update(layer).norm()) == pytest.approx(float(layer.core.weight.detach().norm()), rel=1e-12)
    spectral = pmss_layer(kind, 24, 15, 6, coordinates="spectral")
    assert float(torch.linalg.matrix_norm(update(spectral), 2)) <= float(spectral.core.weight.detach().norm())


@pytest.mark.parametrize("coordinates", COORDINATES)
def test_set_update_is_the_inverse_of_core_update(coordinates: str) -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        layer = pmss_layer(out=24, inp=15, rank=6, coordinates=coordinates, scale=0.3, dtype=dtype)
        trained, wanted = layer.core.weight.detach().clone(), random_like(6, 6, seed=8)
        if coordinates == "rotation":  # not any U is a rotation
            with pytest.raises(
                ValueError, match="not a rotation of the weight .* load it with coordinates='orthonormal'"
            ):
                layer.set_update(PMSSUpdate(wanted, layer.rows, layer.cols))
            other = copy.deepcopy(layer)
            other.core.weight.data.copy_(random_like(*trained.shape, seed=8))
            wanted = other.core_update().detach().double()
        layer.set_update(PMSSUpdate(wanted, layer.rows, layer.cols))
        assert relative(layer.core_update(), wanted) < tolerance
        assert relative(layer.core.weight, trained) > 0.1
        layer.core.weight.data.copy_(trained)
        layer.set_update(layer.update())
        assert relative(layer.core.weight, trained) < tolerance


def test_a_rotation_needs_two_rows() -> None:
    weight = random_like(9, 8)
    one = torch.tensor([1])
    with pytest.raises(ValueError, match="`a.b`: with rank 1 there is nothing to rotate; type a rank of at least 2"):
        coordinate_frame(weight[:, one], weight[one], "rotation", "a.b", weight=weight)


def test_a_rotation_keeps_the_singular_values_of_what_it_turns_and_counts_half() -> None:
    layer = pmss_layer(out=24, inp=15, rank=6, coordinates="rotation", size=0.5)
    assert layer.core.weight.numel() == 15
    q_c, q_r = torch.linalg.qr(layer.weight_columns()).Q, torch.linalg.qr(layer.weight_rows().T).Q
    before = q_c.T @ layer.base_weight() @ q_r
    after = before + q_c.T @ update(layer) @ q_r
    assert relative(after, before) > 0.2
    torch.testing.assert_close(torch.linalg.svdvals(after), torch.linalg.svdvals(before))


def test_a_small_rotation_has_about_the_norm_of_its_numbers() -> None:
    layer = pmss_layer(out=60, inp=50, rank=24, coordinates="rotation", size=1e-3, scale=0.5)
    assert float(update(layer).norm()) == pytest.approx(0.5 * float(layer.core.weight.detach().norm()), rel=0.1)


def test_linearly_dependent_slices_are_refused() -> None:
    weight = random_like(9, 8)
    weight[:, 3] = 2 * weight[:, 1]
    cols, rows = torch.tensor([1, 3, 5]), torch.tensor([0, 1, 2])
    for coordinates in ("raw", "spectral"):
        coordinate_frame(weight[:, cols], weight[rows], coordinates)
    message = r"`a.b`: the 3 selected columns and 3 rows have only numerical rank 2 and 3; set rank_pattern={'a.b': 2}"
    with pytest.raises(ValueError, match=message):
        coordinate_frame(weight[:, cols], weight[rows], "orthonormal", "a.b")
