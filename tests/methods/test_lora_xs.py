"""LoRA-XS against the singular value decomposition; training from a file; refusals."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_pmss import AdapterConfig, LoRAXSConfig, convert, load_adapter, save_adapter
from lightning_pmss.conversion.convert import adapted_layers
from lightning_pmss.methods import lora_xs
from lightning_pmss.named import combine_adapters, load_adapters, set_adapter
from tests.methods.dense import TARGETS, is_dense, layers, trained


def config(**options: Any) -> AdapterConfig:
    return LoRAXSConfig(**{"target_modules": TARGETS, "rank": 4} | options)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_the_layer_is_the_formula(scale: float) -> None:
    def changed(weight: torch.Tensor, core: Any) -> torch.Tensor:
        u, s, vt = torch.linalg.svd(weight, full_matrices=False)
        signs = (u.T @ core.frame.B.detach()).diagonal()[:4]  # of the columns, on which a decomposition is free
        u, vt = u[:, :4] * signs, signs[:, None] * vt[:4]
        return weight + scale * u @ core.R @ (s[:4, None] * vt)

    is_dense(config(scale=scale), changed)


@pytest.mark.parametrize("shape", [(6, 12), (12, 6), (8, 8)])
def test_the_factors_are_the_singular_vectors_with_fixed_signs(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    a, b = lora_xs.singular_factors(weight, 3, "layer")
    torch.testing.assert_close(b @ a, u[:, :3] * s[:3] @ vt[:3])
    torch.testing.assert_close(b.T @ b, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(a.norm(dim=1), s[:3])
    assert bool((b.gather(0, b.abs().argmax(0, keepdim=True)) > 0).all())


def test_starts() -> None:
    for init, size in (("zero", 0.0), ("normal", 1e-5)):
        model = nn.Sequential(nn.Linear(64, 64))
        convert(model, LoRAXSConfig(target_modules=["0"], rank=32, init=init, seed=3))
        (tensor,) = adapted_layers(model)["0"].core.trained().values()
        assert float(tensor.std()) == pytest.approx(size, rel=0.1)
        again = nn.Sequential(nn.Linear(64, 64))
        convert(again, LoRAXSConfig(target_modules=["0"], rank=32, init=init, seed=3))
        assert torch.equal(next(iter(adapted_layers(again)["0"].core.trained().values())), tensor)
    with pytest.raises(ValueError, match="init='other' is not known"):
        LoRAXSConfig(init="other")


def steps(model: nn.Module, count: int, optimizer: torch.optim.Optimizer) -> list[float]:
    losses = []
    x = torch.randn(16, 12, generator=torch.Generator().manual_seed(5))
    for _ in range(count):
        loss = (model(x) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def test_training_goes_on_from_a_file_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = layers(torch.float32)
    convert(model, config())
    optimizer = optimizer_of(model)
    steps(model, 5, optimizer)
    save_adapter(model, tmp_path / "adapter")
    state = copy.deepcopy(optimizer.state_dict())
    expected = steps(model, 5, optimizer)
    assert expected[-1] < expected[0]

    def other_machine(*args: Any) -> Any:  # of which the decomposition has other signs
        raise AssertionError("the factors were computed although the file has them")

    monkeypatch.setattr(lora_xs, "singular_factors", other_machine)
    loaded = layers(torch.float32)
    load_adapter(loaded, tmp_path / "adapter")
    optimizer = optimizer_of(loaded)
    optimizer.load_state_dict(state)
    assert steps(loaded, 5, optimizer) == expected


def test_a_file_with_other_signs_loads_into_a_converted_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = lora_xs.singular_factors

    def flipped(*args: Any) -> Any:
        a, b = right(*args)
        signs = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=a.dtype)
        return signs[:, None] * a, b * signs

    x = torch.randn(3, 12, generator=torch.Generator().manual_seed(1))
    with monkeypatch.context() as patch:
        patch.setattr(lora_xs, "singular_factors", flipped)
        model = layers(torch.float32)
        trained(model, config())
        save_adapter(model, tmp_path / "adapter")
    other = layers(torch.float32)
    convert(other, config())
    load_adapter(other, tmp_path / "adapter")
    torch.testing.assert_close(other(x), model(x), rtol=1e-4, atol=1e-5)
    with monkeypatch.context() as patch:
        patch.setattr(lora_xs, "singular_factors", lambda w, r, n: (torch.randn(r, w.shape[1]), torch.randn(len(w), r)))
        strange = layers(torch.float32)
        convert(strange, config())
    with pytest.raises(
        ValueError, match="`0` has other singular vectors than the adapter. Load the adapter into a model"
    ):
        load_adapter(strange, tmp_path / "adapter")


def test_sums_of_adapters_on_one_base(tmp_path: Path) -> None:
    x = torch.randn(3, 12, generator=torch.Generator().manual_seed(1))
    base, outputs = layers(torch.float32), []
    single = nn.Sequential(base[0])
    for seed in (1, 2):
        model = nn.Sequential(layers(torch.float32)[0])
        convert(model, config(target_modules=["0"]))
        nn.init.normal_(adapted_layers(model)["0"].core.R, generator=torch.Generator().manual_seed(seed))  # type: ignore[arg-type]
        save_adapter(model, tmp_path / str(seed))
        outputs.append(model(x) - single(x))
    model = nn.Sequential(layers(torch.float32)[0])
    load_adapters(model, {"a": tmp_path / "1", "b": tmp_path / "2"})
    combine_adapters(model, "sum", {"a": 0.5, "b": -2.0})
    set_adapter(model, "sum")
    torch.testing.assert_close(model(x), single(x) + 0.5 * outputs[0] - 2 * outputs[1], rtol=1e-4, atol=1e-4)


def test_refusals() -> None:
    model = layers()
    with torch.no_grad():
        model[0].weight[2:] = model[0].weight[:1]
    with pytest.raises(
        ValueError, match="`0`: its weight has the rank 2, and 4 singular vectors are asked for. Type a smaller"
    ):
        convert(model, config())
    assert not adapted_layers(model)
    model[0].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="`0`: its weight has NaN"):
        convert(model, config())
    with torch.device("meta"):
        meta = nn.Sequential(nn.Linear(12, 6))
    with pytest.raises(
        ValueError, match="`0` is on the meta device, and its singular vectors need W; load the weights first"
    ):
        convert(meta, config(target_modules=["0"]))
