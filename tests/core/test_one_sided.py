"""``columns="all"``: what is particular to it; tests/methods/test_contract.py asks the rest of all methods."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from lightning_pmss import PMSSConfig, convert, save_adapter
from lightning_pmss.files import save_skeleton
from lightning_pmss.inspect.inspection import inspect_adapter
from lightning_pmss.methods.pmss.one_sided import OneSidedEdit, OneSidedLinear

SHAPES = [(12, 20), (16, 16), (24, 10)]


def layer_of(
    out: int,
    inp: int,
    *,
    bias: bool = True,
    conv1d: bool = False,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    **options: Any,
) -> OneSidedLinear:
    """A converted layer with a V that is not zero."""
    torch.manual_seed(seed)
    base: Any = Conv1D(out, inp) if conv1d else nn.Linear(inp, out, bias=bias)
    if conv1d:
        nn.init.normal_(base.weight, std=inp**-0.5)
        nn.init.normal_(base.bias)
    net = nn.Sequential(base.to(dtype))
    convert(net, PMSSConfig(**({"target_modules": ["0"], "columns": "all", "rank": 3} | options)))
    layer: Any = net[0]
    nn.init.normal_(layer.core.weight, std=0.3 / layer.scale)
    return layer  # type: ignore[no-any-return]


def reference(layer: OneSidedLinear, x: Tensor, v: Tensor) -> Tensor:
    """From the definition: rows of W, made orthonormal by float64 QR, and V."""
    weight = layer.base_weight().double()
    rows = weight[layer.rows]
    q, t = torch.linalg.qr(rows.T)
    del q
    features = torch.linalg.solve(t.T, rows)  # orthonormal rows
    changed = weight + layer.scale * v.double() @ features
    return F.linear(x.double(), changed, None if layer.bias is None else layer.bias.double())


@pytest.mark.parametrize(("out", "inp"), SHAPES)
@pytest.mark.parametrize("kind", ["bias", "no bias", "conv1d"])
@pytest.mark.parametrize("inputs_train", [True, False])
def test_forward_and_gradients_are_those_of_the_dense_layer(out: int, inp: int, kind: str, inputs_train: bool) -> None:
    layer = layer_of(out, inp, bias=kind == "bias", conv1d=kind == "conv1d")
    if kind != "no bias":
        assert layer.bias is not None
        layer.bias.requires_grad_(True)
    x = torch.randn(2, 5, inp, dtype=torch.float64, requires_grad=inputs_train)
    weights = torch.randn(2, 5, out, dtype=torch.float64)
    y = layer(x)
    own: list[Any] = [
        layer.core.weight,
        *([x] if inputs_train else []),
        *([layer.bias] if layer.bias is not None else []),
    ]
    found = torch.autograd.grad((y * weights).sum(), own)
    expected = reference(layer, x, layer.core.weight)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-10)
    for ours, theirs in zip(found, torch.autograd.grad((expected * weights).sum(), own), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


def test_gradcheck() -> None:
    torch.manual_seed(0)
    x, u = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 6), (5, 2)))
    weight, rows = torch.randn(5, 6, dtype=torch.float64), torch.tensor([1, 4])
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(4, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, b, u: OneSidedEdit.apply(x, weight, b, u, rows, mask, False), (x, bias, u)
    )
    assert torch.autograd.gradcheck(
        lambda x, b, u: OneSidedEdit.apply(x, weight.T.contiguous(), b, u, rows, None, True), (x, bias, u)
    )


def test_a_hidden_product_gets_its_features_from_x() -> None:
    """A layer whose forward is its own business is a black box: same result, other path."""

    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input)

    torch.manual_seed(0)
    net = nn.Sequential(Doubled(7, 9)).double()
    convert(net, PMSSConfig(target_modules=["0"], columns="all", rank=3))
    layer: Any = net[0]
    nn.init.normal_(layer.core.weight, std=0.3)
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    expected = reference(layer, x, layer.core.weight)
    torch.testing.assert_close(layer(x), expected)
    for ours, theirs in zip(
        torch.autograd.grad(layer(x).square().sum(), [x, layer.core.weight]),
        torch.autograd.grad(expected.square().sum(), [x, layer.core.weight]),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("hidden", [False, True])
def test_keeps_the_features_of_a_token_and_nothing_of_its_input(hidden: bool) -> None:
    class Hidden(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input)

    tokens, inp, out, rank = 100, 40, 30, 3
    torch.manual_seed(0)
    net = nn.Sequential((Hidden if hidden else nn.Linear)(inp, out))
    convert(net, PMSSConfig(target_modules=["0"], columns="all", rank=rank))
    layer: Any = net[0]
    known = {t.untyped_storage().data_ptr() for t in (layer.weight, layer.core.weight, layer.rows)}
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        net(torch.randn(tokens, inp, requires_grad=True))
    per_token = [t for t in saved if tokens in t.shape]
    assert sum(t.numel() for t in per_token) == tokens * rank
    rest = {t.untyped_storage().data_ptr(): t.numel() for t in saved if tokens not in t.shape}
    assert sum(rest.values()) <= 2 * out * rank + rank * inp + 2 * rank * rank  # U, V's factor; hidden: the rows


def test_dropout_acts_on_the_features_and_only_in_training() -> None:
    layer = layer_of(12, 20, dropout=0.5)
    x = torch.randn(400, 20, dtype=torch.float64)
    base = layer.base(x)
    layer.eval()
    whole = layer(x) - base
    layer.train()
    torch.manual_seed(1)
    dropped = layer(x) - base
    # With U of full column rank each token's change says which of its three features were dropped.
    coefficients = (
        torch.linalg.lstsq(layer.core_update(), dropped.T).solution
        / torch.linalg.lstsq(layer.core_update(), whole.T).solution
    )
    kept = coefficients.detach().abs() > 1
    torch.testing.assert_close(coefficients.detach(), 2.0 * kept.double(), atol=1e-8, rtol=0)
    assert 0.4 < float(kept.double().mean()) < 0.6


@pytest.mark.parametrize("coordinates", ["orthonormal", "spectral", "raw"])
def test_coordinates_say_what_v_is(coordinates: str) -> None:
    layer = layer_of(12, 20, coordinates=coordinates, scale=2.0)
    v, rows = layer.core.weight.detach(), layer.weight_rows()
    update = layer.core_update().detach() @ rows
    if coordinates == "orthonormal":  # the update is as large as V
        assert float(update.norm()) == pytest.approx(2.0 * float(v.norm()), rel=1e-9)
    else:
        gain = 1.0 if coordinates == "raw" else 1.0 / float(torch.linalg.matrix_norm(rows, 2))
        torch.testing.assert_close(update, 2.0 * gain * v @ rows)


def test_bfloat16_layer_under_autocast_is_near_float32() -> None:
    exact = layer_of(24, 40, rank=6, dtype=torch.float32)
    x = torch.randn(64, 40)
    expected = exact(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = exact(x)
    assert found.dtype == torch.bfloat16
    assert float((found.float() - expected).norm() / expected.norm()) < 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coordinates": "rotation"}, "rotates selected columns"),
        ({"edit": "weight"}, r"edit='weight' is for columns='selected'"),
        ({"memory": "keep"}, r"memory='keep' is for columns='selected'"),
        ({"row_mode": "nested"}, r"row_mode='nested' is for columns='selected'"),
    ],
)
def test_options_of_the_square_core_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PMSSConfig(columns="all", **options)


def test_other_columns_are_refused() -> None:
    with pytest.raises(ValueError, match=r"columns='both' is not known; choose one of \['selected', 'all'\]"):
        PMSSConfig(columns="both")


def test_the_scale_follows_the_trained_numbers() -> None:
    """A square core of as many numbers has a tenth of it."""
    one_sided, square = PMSSConfig(columns="all"), PMSSConfig()
    assert one_sided.scale_of(4, (256, 100)) == pytest.approx(10 * square.scale_of(32, (256, 100)))
    assert PMSSConfig(columns="all", scale=3.0).scale_of(4, (256, 100)) == 3.0
    net = nn.Sequential(nn.Linear(20, 12), nn.Linear(12, 48))
    convert(net, PMSSConfig(columns="all", rank=3))
    scales: list[Any] = [layer.scale for layer in net]
    assert scales == pytest.approx([640 / 6, 640 / 12])


def test_a_skeleton_file_is_for_one_kind_of_skeleton(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(8, 6))
    square, one_sided = (PMSSConfig(target_modules=["0"], columns=columns, rank=2) for columns in ("selected", "all"))
    for config in (square, one_sided):
        model = nn.Sequential(nn.Linear(8, 6))
        model.load_state_dict(net.state_dict())
        convert(model, config)
        save_skeleton(model, tmp_path / f"{config.columns}.safetensors")
    for config, other in ((square, "all"), (one_sided, "selected")):
        options = {"target_modules": ["0"], "columns": config.columns, "rank": 2}
        file = tmp_path / f"{config.columns}.safetensors"
        with torch.device("meta"):
            born = nn.Sequential(nn.Linear(8, 6))
        convert(born, PMSSConfig(**options, skeleton_file=file))
        born.to_empty(device="cpu")
        with pytest.raises(ValueError, match=rf"is for columns='{other}', and this run has columns='{config.columns}'"):
            convert(
                nn.Sequential(nn.Linear(8, 6)), PMSSConfig(**options, skeleton_file=tmp_path / f"{other}.safetensors")
            )


def test_dependent_rows_are_refused_with_a_remedy() -> None:
    net = nn.Sequential(nn.Linear(8, 6))
    with torch.no_grad():
        net[0].weight[2:] = net[0].weight[:1]
    with pytest.raises(ValueError, match=r"`0`: .*numerical rank 2.*rank_pattern=\{'0': 2\}"):
        convert(net, PMSSConfig(target_modules=["0"], columns="all", rank=3))


def test_the_report_says_what_of_w_the_rows_span() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 12)).double()
    (entry,) = convert(net, PMSSConfig(target_modules=["0"], columns="all", rank=4)).layers
    layer: Any = net[0]
    q = torch.linalg.qr(layer.weight_rows().T).Q
    rest = layer.weight - layer.weight @ q @ q.T
    assert entry.residual == pytest.approx(float(rest.norm() / layer.weight.norm()), rel=1e-5)
    assert entry.trainable == 12 * 4
    assert math.isfinite(entry.rounding_error)


def test_inspect_and_the_card_say_what_it_is(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(20, 12))
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    convert(net, PMSSConfig(target_modules=["0"], columns="all", rank=4))
    layer: Any = net[0]
    nn.init.normal_(layer.core.weight)
    save_adapter(net, tmp_path / "adapter")
    assert "`W' = W + U R`" in (tmp_path / "adapter" / "README.md").read_text()
    (entry,) = inspect_adapter(tmp_path / "adapter", tmp_path, progress=False).layers
    q = torch.linalg.qr(layer.weight_rows().double().T).Q
    weight = layer.base_weight().double()
    assert entry.skeleton_energy == pytest.approx(float((weight @ q).norm() / weight.norm()) ** 2, rel=1e-6)
    update = layer.core_update().double() @ layer.weight_rows().double()
    assert entry.update_norm == pytest.approx(float(update.detach().norm()), rel=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_activation_checkpointing_gives_the_same_gradients(reentrant: bool, dropout: float) -> None:
    layer = layer_of(12, 20, dropout=dropout)
    x = torch.randn(6, 20, dtype=torch.float64, requires_grad=True)
    found = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant)):
        torch.manual_seed(2)
        layer.core.weight.grad = x.grad = None
        run(x).square().sum().backward()
        assert layer.core.weight.grad is not None
        assert x.grad is not None
        found.append((layer.core.weight.grad.clone(), x.grad.clone()))
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-12, atol=1e-12)
