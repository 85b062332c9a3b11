"""The converted layer as a module: copies, casts, state dicts, dropout."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from dense import COORDINATES, EDITS, KINDS, adopted, base_layer, dense_weight, pmss_layer, random_like, relative, train
from torch import Tensor, nn

from lightning_pmss.methods.pmss.layer import PMSSLinear

LOW = (torch.bfloat16, torch.float16)


def _core_tensors(layer: PMSSLinear) -> dict[str, Tensor]:
    return {**dict(layer.core.named_parameters()), **dict(layer.core.named_buffers())}


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("kind", KINDS)
def test_class_parameters_and_keys_of_the_base_stay(kind: str, coordinates: str) -> None:
    base = base_layer(kind, 12, 10)
    cls, keys, weight, bias = type(base), list(base.state_dict()), base.weight, base.bias
    layer = adopted(base, 4, coordinates)
    assert layer is base
    assert isinstance(layer, PMSSLinear)
    assert isinstance(layer, cls)
    assert layer.weight is weight
    assert layer.bias is bias
    added = [k for k in layer.state_dict() if k not in keys]
    assert list(layer.state_dict())[: len(keys)] == keys
    assert {k for k in added if not k.startswith("core.")} == {"rows", "cols"}
    assert "core.weight" in added
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["core.weight"]
    assert layer.rows.dtype == layer.cols.dtype == torch.int64
    assert type(layer).__name__ == f"PMSS{cls.__name__}"
    if kind == "linear":  # Conv1D writes its own
        assert repr(layer).startswith("PMSSLinear(")
        assert "in_features=10, out_features=12, bias=True, pmss(rank=4x4" in repr(layer)


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_equal_and_independent(way: str, kind: str, coordinates: str) -> None:
    layer = pmss_layer(kind, coordinates=coordinates, dropout=0.25, scale=0.5)
    if way == "deepcopy":
        other = copy.deepcopy(layer)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(layer))  # noqa: S301
    else:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert type(other) is type(layer)
    assert (other.scale, other.dropout, other.edit, other.coordinates) == (0.5, 0.25, layer.edit, coordinates)
    x = random_like(5, 10)
    layer.eval(), other.eval()
    expected = layer(x)
    assert torch.equal(other(x), expected)
    with torch.no_grad():
        other.core.weight.zero_()
    assert torch.equal(layer(x), expected)
    assert not torch.equal(other(x), expected)


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("dtype", LOW)
def test_low_precision_casts_leave_the_core_in_float32(dtype: torch.dtype, coordinates: str) -> None:
    layer = pmss_layer(dtype=torch.float32, coordinates=coordinates)
    model = nn.Sequential(layer)
    before = {k: t.detach().clone() for k, t in _core_tensors(layer).items()}
    for cast in (lambda: model.to(dtype), lambda: model.bfloat16() if dtype == torch.bfloat16 else model.half()):
        cast()
        assert layer.weight.dtype == dtype
        assert layer.bias is not None
        assert layer.bias.dtype == dtype
        for key, tensor in _core_tensors(layer).items():
            assert tensor.dtype == torch.float32, key
            assert torch.equal(tensor, before[key]), key
        assert layer.core.weight.requires_grad
        y = layer(random_like(3, 10, dtype=dtype))
        assert y.dtype == dtype
        (grad,) = torch.autograd.grad(y.sum(), layer.core.weight)
        assert grad.dtype == torch.float32
    model.float()
    assert {t.dtype for t in (*layer.parameters(), *_core_tensors(layer).values())} == {torch.float32}
    assert layer.rows.dtype == torch.int64


def test_double_and_back() -> None:
    layer = pmss_layer(dtype=torch.float32)
    x = random_like(3, 10)
    expected = layer(x.float())
    layer.double()
    assert {t.dtype for t in (layer.weight, *_core_tensors(layer).values())} == {torch.float64}
    assert relative(layer(x), expected) < 1e-6
    layer.float()
    assert torch.equal(layer(x.float()), expected)


def test_a_bfloat16_base_gets_a_float32_core() -> None:
    for dtype, core in (
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float64, torch.float64),
    ):
        layer = adopted(base_layer("linear", 12, 10, dtype=dtype), 4)
        assert {t.dtype for t in _core_tensors(layer).values()} == {core}
    optimizer = torch.optim.AdamW([layer.core.weight], lr=1e-4)
    layer = train(adopted(base_layer("linear", 12, 10, dtype=torch.bfloat16), 4))
    optimizer = torch.optim.AdamW([layer.core.weight], lr=1e-5)
    before = layer.core.weight.detach().clone()
    layer(random_like(3, 10, dtype=torch.bfloat16)).float().square().sum().backward()
    optimizer.step()
    moved = (layer.core.weight.detach() - before).abs()
    assert 0.9e-5 < float(moved.median()) < 1.2e-5, "a small step on a large U must survive"


@pytest.mark.parametrize("coordinates", COORDINATES)
def test_meta_and_back(coordinates: str) -> None:
    layer = pmss_layer(dtype=torch.bfloat16, coordinates=coordinates)
    state = {k: t.clone() for k, t in layer.state_dict().items()}
    x = random_like(3, 10, dtype=torch.bfloat16)
    expected = layer(x)
    layer.to("meta")
    assert all(t.is_meta for t in layer.state_dict().values())
    assert layer.core.weight.dtype == torch.float32
    assert layer(x.to("meta")).shape == expected.shape
    layer.to_empty(device="cpu")
    assert layer.core.weight.dtype == torch.float32
    layer.load_state_dict(state)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("kind", KINDS)
def test_loading_other_indices_brings_their_frame(kind: str, coordinates: str) -> None:
    """Stored: V and indices, without the factors, as in a checkpoint."""
    layer = pmss_layer(kind, 14, 12, coordinates=coordinates)
    other = pmss_layer(kind, 14, 12, coordinates=coordinates)
    taken = (set(layer.rows.tolist()), set(layer.cols.tolist()))
    rows = torch.tensor([i for i in range(14) if i not in taken[0]][:4])
    cols = torch.tensor([i for i in range(12) if i not in taken[1]][:4])
    state = {"rows": rows, "cols": cols, "core.weight": layer.core.weight.detach() * 2}
    other.load_state_dict(state, strict=False)
    x = random_like(5, 12)
    assert relative(other(x), nn.functional.linear(x, dense_weight(other, state["core.weight"]), other.bias)) < 1e-12
    assert relative(other(x), layer(x)) > 1e-3
    # another W: the coordinates follow it as well
    third = pmss_layer(kind, 14, 12, coordinates=coordinates, seed=7)
    layer.load_state_dict({"weight": third.weight.detach()}, strict=False)
    expected = nn.functional.linear(x, dense_weight(layer, layer.core.weight), layer.bias)
    assert relative(layer(x), expected) < 1e-12


def test_loading_unusable_indices_names_the_module() -> None:
    model = nn.Sequential(pmss_layer(out=14, inp=12))
    layer = model[0]
    weight = layer.weight.detach().clone()
    weight[:, layer.cols[1]] = weight[:, layer.cols[0]]
    with pytest.raises(ValueError, match="`0`: the 4 selected columns and 4 rows have only numerical rank 3 and"):
        model.load_state_dict({"0.weight": weight}, strict=False)


@pytest.mark.parametrize("edit", EDITS)
def test_dropout_is_off_in_evaluation(edit: str) -> None:
    layer = pmss_layer(edit=edit, dropout=0.5)
    x = random_like(6, 10)
    layer.eval()
    expected = nn.functional.linear(x, dense_weight(layer, layer.core.weight), layer.bias)
    assert relative(layer(x), expected) < 1e-12
    layer.train()
    assert relative(layer(x), expected) > 0.01


@pytest.mark.parametrize("edit", EDITS)
def test_dropout_falls_on_h_and_keeps_the_mean(edit: str) -> None:
    layer = pmss_layer(edit=edit, dropout=0.25).train()
    x = random_like(10).expand(40_000, 10)
    torch.manual_seed(0)
    with torch.no_grad():
        y = layer(x)
        h = x[0] @ layer.weight_rows().T
        base = nn.functional.linear(x[0], layer.weight, layer.bias)
        parts = h[:, None] * layer.core_update().T @ layer.weight_columns().T  # what each element of h adds to y
    expected = base + parts.sum(0)
    # every y is the base plus a subset of h's parts, scaled by 1 / (1 - p)
    masks = torch.linalg.lstsq(parts.T, (y - base).T).solution
    assert float((masks - (masks > 0.5) / 0.75).abs().max()) < 1e-6
    assert float((masks > 0.5).double().mean()) == pytest.approx(0.75, abs=0.005)
    assert float((masks > 0.5).double().mean(1).min()) > 0.73
    deviation = (y - base).std(0) / 40_000**0.5
    assert bool(((y.mean(0) - expected).abs() < 5 * deviation).all())


@pytest.mark.parametrize("memory", ["keep", "regather"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("edit", EDITS)
def test_dropout_gradients_equal_plain_autograd(edit: str, kind: str, memory: str) -> None:
    layer = pmss_layer(kind, edit=edit, dropout=0.4, memory=memory).train()
    x = random_like(6, 10).requires_grad_()
    torch.manual_seed(5)
    found = torch.autograd.grad(layer(x).square().sum(), [x, layer.core.weight])
    torch.manual_seed(5)
    mask = nn.functional.dropout(torch.ones(6, 4, dtype=torch.float64), 0.4)
    assert 0 < int((mask == 0).sum()) < mask.numel()
    weight, u = layer.base_weight(), layer.core_update()
    h = (x @ weight[layer.rows].T) * mask
    y = x @ weight.T + h @ u.T @ weight[:, layer.cols].T + layer.bias
    expected = torch.autograd.grad(y.square().sum(), [x, layer.core.weight])
    assert max(relative(a, b) for a, b in zip(found, expected, strict=True)) < 1e-12


def test_two_cores_in_one_model_train_apart() -> None:
    model = nn.Sequential(pmss_layer(out=10, inp=10, seed=1), nn.GELU(), pmss_layer(out=10, inp=10, seed=2))
    weights = [layer.weight.detach().clone() for layer in (model[0], model[2])]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(3):
        loss = model(random_like(20, 10)).square().mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] > losses[1] > losses[2]
    assert all(torch.equal(w, layer.weight) for w, layer in zip(weights, (model[0], model[2]), strict=True))
