"""Modules of torch that read their linear layers' weights without calling them: refused, or converted correctly."""

from __future__ import annotations

import pytest
import torch
from dense import random_like, train, update
from torch import Tensor, nn

from lightning_pmss.conversion.convert import adapted_layers, convert
from lightning_pmss.methods.pmss.config import PMSSConfig

OPTIONS = {"d_model": 16, "nhead": 2, "dim_feedforward": 32, "dropout": 0.0, "batch_first": True}
PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])


def _encoder(kind: str, activation: str, norm_first: bool) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(**OPTIONS, activation=activation, norm_first=norm_first)  # type: ignore[arg-type]
    model = layer if kind == "layer" else nn.TransformerEncoder(layer, 2)
    for p in model.parameters():  # the copies in an encoder start equal; biases start at zero
        p.data.add_(0.05 * torch.randn_like(p))
    return model.double()


def _pair(kind: str, activation: str = "relu", norm_first: bool = False) -> tuple[nn.Module, nn.Module]:
    """A converted, trained encoder and an ordinary one with W + s C U R in its weights."""
    model, dense = _encoder(kind, activation, norm_first), _encoder(kind, activation, norm_first)
    convert(model, PMSSConfig(rank=6))
    plain = dict(dense.named_modules())
    for i, (name, layer) in enumerate(adapted_layers(model).items()):
        train(layer, seed=i)
        plain[name].weight.data += update(layer)  # type: ignore[union-attr, operator]
    return model, dense


def _outputs(model: nn.Module, x: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    found = {"train": model.train()(x, src_key_padding_mask=mask), "eval": model.eval()(x, src_key_padding_mask=mask)}
    with torch.no_grad():
        found["no_grad"] = model(x, src_key_padding_mask=mask)
    with torch.inference_mode():
        found["inference_mode"] = model(x, src_key_padding_mask=mask)
    return {k: y.detach().clone() for k, y in found.items()}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("activation", "norm_first"), [("relu", False), ("gelu", True)])
@pytest.mark.parametrize("kind", ["layer", "encoder"])
def test_encoder_equals_the_dense_one_in_every_mode(kind: str, activation: str, norm_first: bool, padded: bool) -> None:
    model, dense = _pair(kind, activation, norm_first)
    x = random_like(3, 5, 16)
    mask = PADDING if padded else None
    valid = ~PADDING if padded else torch.ones(3, 5, dtype=torch.bool)  # padding is zeroed by the nested-tensor path
    reference = dense.train()(x, src_key_padding_mask=mask)
    bare = _encoder(kind, activation, norm_first)(x, src_key_padding_mask=mask)
    assert float((reference - bare)[valid].abs().max()) > 0.05, "the update must matter"
    for mode, y in _outputs(model, x, mask).items():
        assert float((y - reference)[valid].abs().max()) < 1e-12, mode


def test_the_fused_path_would_be_wrong() -> None:
    """Switched back on, torch's kernel runs on the bare weights: the test above can fail."""
    model, dense = _pair("layer")
    model.activation_relu_or_gelu = 1  # type: ignore[assignment]
    x = random_like(3, 5, 16)
    # it needs weights without gradient: those of the layer itself have none, U lies in a child module
    model.requires_grad_(False)
    outputs = _outputs(model, x, None)
    reference = dense.train()(x)
    assert float((outputs["train"] - reference).abs().max()) < 1e-12
    assert float((outputs["no_grad"] - reference).abs().max()) > 1e-3


def test_encoder_trains_and_says_what_was_switched_off() -> None:
    model = _encoder("encoder", "relu", False)
    report = convert(model, PMSSConfig(rank=6))
    assert [layer.name for layer in report.layers] == [f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]
    assert {name for name in report.left_out if name.endswith("out_proj")} == {
        f"layers.{i}.self_attn.out_proj" for i in (0, 1)
    }
    assert all(
        why == "2-dimensional parameter of MultiheadAttention"
        if name.endswith("in_proj_weight")
        else "never calls its forward" in why
        for name, why in report.left_out.items()
    )
    assert sum("fused inference path" in note for note in report.notes) == 2
    model.train()(random_like(3, 5, 16)).square().sum().backward()
    for name, layer in adapted_layers(model).items():
        assert layer.core.weight.grad is not None, name
        assert torch.count_nonzero(layer.core.weight.grad) > 0, name


def test_unconverted_encoders_keep_their_fast_path() -> None:
    model = nn.ModuleDict({"a": _encoder("layer", "relu", False), "b": _encoder("encoder", "relu", False)})
    convert(model, PMSSConfig(target_modules=["a.linear1"], rank=4))
    assert model["a"].activation_relu_or_gelu == 0
    assert model["b"].use_nested_tensor
    assert all(layer.activation_relu_or_gelu == 1 for layer in model["b"].layers)  # type: ignore[union-attr]


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.attention(x, x, x)[0])
        return y


@pytest.mark.parametrize("target", [["out_proj"], ["attention.out_proj", "fc"], r".*out_proj"])
def test_out_proj_of_attention_is_refused_by_name(target: list[str] | str) -> None:
    model = _Attention()
    before = {k: type(m) for k, m in model.named_modules()}
    with pytest.raises(ValueError, match="`attention.out_proj` belongs to nn.MultiheadAttention.*exclude it"):
        convert(model, PMSSConfig(target_modules=target, rank=4))
    assert {k: type(m) for k, m in model.named_modules()} == before, "touched before it was refused"
    assert all(p.requires_grad for p in model.parameters())


def test_all_linear_leaves_attention_out_with_the_reason() -> None:
    model = _Attention()
    report = convert(model, PMSSConfig(rank=4))
    assert [layer.name for layer in report.layers] == ["fc"]
    assert "nn.MultiheadAttention never calls its forward" in report.left_out["attention.out_proj"]
    assert "attention.out_proj" in str(report)
