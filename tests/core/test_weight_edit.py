"""The weight edit equals the dense ``W + s C U R``, keeps only y[rows], and refuses where it would be wrong."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dense import COORDINATES, KINDS, adopted, base_layer, dense_weight, pmss_layer, random_like, relative
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from lightning_pmss import PMSSConfig, convert
from lightning_pmss.methods.pmss.layer import PMSSLinear
from lightning_pmss.methods.pmss.weight_edit import LinearWeightEdit, break_even_tokens

SHAPES = {  # (out, in), rank
    "tall": ((24, 10), 6),
    "wide": ((10, 24), 6),
    "odd": ((7, 13), 5),
    "rank 1": ((11, 9), 1),
    "full rank": ((6, 9), 6),
    "one row": ((1, 9), 1),
}


def _compare(layer: PMSSLinear, x: Tensor, tolerance: float) -> None:
    """Output and all gradients against the dense weight in float64."""
    x = x.detach().requires_grad_(x.requires_grad)
    wide, x64 = copy.deepcopy(layer).double(), x.detach().double().requires_grad_(x.requires_grad)
    v = wide.core.weight.detach().clone().requires_grad_()
    dense = x64 @ dense_weight(wide, v).T
    bias = None
    if wide.bias is not None:
        bias = wide.bias.detach().clone().requires_grad_(bool(layer.bias.requires_grad))
        dense = dense + bias
    y = layer(x)
    loss = random_like(*y.shape, seed=3)
    pairs = [(x, x64), (layer.core.weight, v), (layer.bias, bias)]
    pairs = [(a, b) for a, b in pairs if a is not None and a.requires_grad]
    found = torch.autograd.grad(y, [a for a, _ in pairs], loss.to(y.dtype))
    expected = torch.autograd.grad(dense, [b for _, b in pairs], loss)
    for a, b in zip((y, *found), (dense, *expected), strict=True):
        assert a.shape == b.shape
        assert relative(a, b) < tolerance, relative(a, b)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_dense_layer(kind: str, shape: str) -> None:
    """Biases, coordinates, dtypes and whether x is trained are crossed within."""
    (out, inp), rank = SHAPES[shape]
    biases = (None, False, True) if kind == "linear" else (False, True)
    for bias, coordinates, trained_x in itertools.product(biases, COORDINATES, (True, False)):
        if coordinates == "rotation" and rank == 1:
            continue  # refused: there is nothing to turn
        for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-4)):
            layer = pmss_layer(
                kind, out, inp, rank, bias=None if bias is None else 1.0, dtype=dtype,
                coordinates=coordinates, edit="weight", scale=0.7,
            )  # fmt: skip
            if bias:
                assert layer.bias is not None
                layer.bias.requires_grad_(True)
            _compare(layer, random_like(5, inp, dtype=dtype).requires_grad_(trained_x), tolerance)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 5), (0, 7)], ids=str)
def test_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    layer = pmss_layer(edit="weight")
    x = random_like(*shape, 10).requires_grad_()
    if 0 in shape:
        layer(x).sum().backward()
        assert layer.core.weight.grad is not None
        assert torch.count_nonzero(layer.core.weight.grad) == 0
    else:
        _compare(layer, x, 1e-11)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("trained", ["x", "u", "bias", "x u", "x u bias"])
def test_gradcheck(trained: str, transposed: bool) -> None:
    """Also with as many rows as not columns."""
    weight = random_like(5, 7) if transposed else random_like(7, 5)
    rows, cols = torch.tensor([5, 0, 2]), torch.tensor([4, 1])
    parts = {"x": random_like(6, 5), "u": 0.3 * random_like(2, 3), "bias": random_like(7)}
    parts = {k: t.requires_grad_(k in trained.split()) for k, t in parts.items()}

    def run(x: Tensor, u: Tensor, bias: Tensor) -> Any:
        return LinearWeightEdit.apply(x, weight, bias, u, rows, cols, transposed)

    assert torch.autograd.gradcheck(run, tuple(parts.values()))


def test_second_derivatives_are_refused() -> None:
    x = random_like(3, 10).requires_grad_()
    (grad,) = torch.autograd.grad(pmss_layer(edit="weight")(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_keeps_the_gathered_rows_and_u_only() -> None:
    layer, tokens = pmss_layer(out=40, inp=30, rank=8, dtype=torch.float32, edit="weight"), 50
    existing = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers(), layer.rows, layer.cols)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = random_like(tokens, 30, dtype=torch.float32).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    assert sum(size for address, size in kept.items() if address not in existing) == (tokens * 8 + 8 * 8) * 4
    y.sum().backward()


def test_activation_checkpointing_and_accumulated_gradients() -> None:
    layer = pmss_layer(edit="weight")
    batches = [random_like(5, 10, seed=s).requires_grad_() for s in (1, 2)]
    plain = torch.autograd.grad(sum(layer(x).square().sum() for x in batches), layer.core.weight)[0]
    for x in batches:
        checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    assert relative(layer.core.weight.grad, plain) < 1e-14


def test_trains_like_the_other_edits() -> None:
    """Thirty steps of AdamW with small updates, in float32: the same losses, and the same U at the end."""
    runs = {}
    for edit in ("weight", "input", "output"):
        layer = adopted(base_layer("linear", 24, 24, dtype=torch.float32), 6, edit=edit)
        x = random_like(64, 24, dtype=torch.float32)
        target = layer(x).detach() + 0.02 * random_like(64, 24, dtype=torch.float32, seed=7)
        optimizer = torch.optim.AdamW([layer.core.weight], lr=1e-3)
        losses = []
        for _ in range(30):
            loss = (layer(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        runs[edit] = losses, layer.core_update().detach()
    for edit in ("input", "output"):
        assert runs["weight"][0] == pytest.approx(runs[edit][0], rel=1e-3)
        assert relative(runs["weight"][1], runs[edit][1]) < 1e-2
    assert runs["weight"][0][-1] < runs["weight"][0][0]


def test_a_singular_system_is_refused() -> None:
    """U chosen such that I + M U is singular: U's gradient is lost in y[rows], and no number may come out."""
    layer = pmss_layer(edit="weight", coordinates="raw")
    m = layer.base_weight()[layer.rows][:, layer.cols]
    with torch.no_grad():
        layer.core.weight.copy_(-torch.linalg.inv(m))
    x = random_like(5, 10).requires_grad_()
    with pytest.raises(RuntimeError, match=r"I \+ M U of a layer of rank 4x4 is close to singular.*edit='auto'"):
        layer(x).sum().backward()
    with torch.no_grad():  # one direction only is lost
        layer.core.weight.mul_(0.5)[:, 1:] = 0
        layer.core.weight[:, 0] *= 2
    with pytest.raises(RuntimeError, match="close to singular"):
        layer(x).sum().backward()
    with torch.no_grad():
        layer.core.weight.copy_(-0.5 * torch.linalg.inv(m))  # I + M U = I / 2
    _compare(layer, x, 1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_refused(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(10, 10)).to(dtype)
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=rf"`0`: edit='weight' rounds .* a {kind} weight away; set edit='auto'"):
        convert(model, PMSSConfig(rank=2, edit="weight"))
    assert type(model[0]) is nn.Linear
    layer = pmss_layer(edit="weight", dtype=torch.float32)
    with pytest.raises(ValueError, match="rounds updates"):
        layer.to(dtype)(random_like(5, 10, dtype=dtype))


def test_other_refusals() -> None:
    class Own(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    for model, options, match in (
        (
            nn.Sequential(Own(10, 10)),
            {},
            "`0`: edit='weight' needs the product of a plain linear layer, which Own hides",
        ),
        (nn.Sequential(nn.Linear(10, 10)), {"dropout": 0.1}, "`0`: edit='weight' forms no h that dropout could act on"),
    ):
        with pytest.raises(ValueError, match=match):
            convert(model, PMSSConfig(rank=2, edit="weight", **options))
    layer, x = pmss_layer(edit="weight", dtype=torch.float32), random_like(5, 10, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="computes in the weight's own dtype"):
        layer(x)
    layer.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="the weight must be frozen"):
        layer(x)


def test_the_counted_break_even_chooses_what_was_measured_to_be_faster() -> None:
    rows = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "break-even.json").read_text())["rows"]
    choices = []
    for row in rows:
        counted = break_even_tokens((row["out"], row["in"]), row["rank"])
        if not 0.9 < row["tokens"] / counted < 1.1:  # there the two are level
            choices.append(row["tokens"] > counted)
            faster = row["weight over frozen"]["median"] < row["thin over frozen"]["median"]
            assert choices[-1] == faster, row
    assert 4 < sum(choices) < len(choices) - 4


def test_compiles_once() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    layer = pmss_layer(edit="weight", dtype=torch.float32)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    optimizer = torch.optim.SGD([layer.core.weight], lr=1e-3)
    for step in range(3):
        x = random_like(5, 10, dtype=torch.float32, seed=step).requires_grad_()
        found = torch.autograd.grad(compiled(x).square().sum(), [x, layer.core.weight])
        expected = torch.autograd.grad(layer(x).square().sum(), [x, layer.core.weight])
        assert max(relative(a, b) for a, b in zip(found, expected, strict=True)) < 1e-5
        layer.core.weight.grad = found[1]
        optimizer.step()
    assert counter.frame_count == 1
