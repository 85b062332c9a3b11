"""The inspection against the dense matrices in float64, and its command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lightning_pmss.cli import main
from lightning_pmss.conversion.convert import adapted_layers
from lightning_pmss.files import save_adapter
from lightning_pmss.inspect.inspection import effective_rank, inspect_adapter, skeleton_energy, update_spectrum
from lightning_pmss.methods.method import Factors

Train = Callable[..., Any]


def _model(folder: str, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


@pytest.mark.parametrize("base", ["tiny_llama", "tiny_gpt2", "sharded_llama"])
def test_against_the_dense_update(base: str, tmp_path: Path, train: Train, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(base)
    dtype = torch.bfloat16 if base == "sharded_llama" else torch.float32
    model = train(_model(folder, dtype), rank=20, scale=0.7)
    save_adapter(model, tmp_path / "a")
    found = inspect_adapter(tmp_path / "a", folder)
    assert [layer.name for layer in found.layers] == list(adapted_layers(model))
    for told, layer in zip(found.layers, adapted_layers(model).values(), strict=True):
        weight, update = layer.base_weight().double(), layer.core_update().detach().double()
        dense = weight[:, layer.cols] @ update @ weight[layer.rows]
        singular = torch.linalg.svdvals(dense)
        assert told.singular_values is not None
        assert told.rank == len(told.singular_values) == min(len(layer.cols), len(layer.rows))
        torch.testing.assert_close(
            torch.tensor(told.singular_values, dtype=torch.float64), singular[: told.rank], rtol=1e-9, atol=1e-10
        )
        assert told.u_norm == pytest.approx(update.norm().item(), rel=1e-9)
        assert told.update_norm == pytest.approx(dense.norm().item(), rel=1e-9)
        assert told.relative_norm == pytest.approx((dense.norm() / weight.norm()).item(), rel=1e-6)
        share = singular[: told.rank] / singular[: told.rank].sum()
        assert told.effective_rank == pytest.approx((-share * share.log()).sum().exp().item(), rel=1e-6)
        left, right = (m @ torch.linalg.pinv(m) for m in (weight[:, layer.cols], weight[layer.rows].T))
        energy = (left @ weight @ right).norm() ** 2 / weight.norm() ** 2
        assert told.skeleton_energy == pytest.approx(energy.item(), rel=1e-5)
        assert 0 < told.skeleton_energy <= 1 + 1e-6
    assert found.to_dict()["layers"][0]["rank"] == found.layers[0].rank


def test_unequal_sides_and_dependent_slices() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(9, 11, dtype=torch.float64, generator=generator)
    weight[:, 3] = weight[:, 1]  # chosen twice over, so to speak: C has rank 3
    rows, cols = torch.tensor([0, 4, 5, 7, 8]), torch.tensor([0, 1, 3, 6])
    update = torch.randn(4, 5, dtype=torch.float64, generator=generator)
    r, c = weight[rows], weight[:, cols]
    singular = update_spectrum(Factors(update @ r, c))
    torch.testing.assert_close(singular, torch.linalg.svdvals(c @ update @ r)[:4], rtol=1e-10, atol=1e-10)
    energy, norm = skeleton_energy(weight, r, c)
    left, right = c @ torch.linalg.pinv(c), r.T @ torch.linalg.pinv(r.T)
    assert energy == pytest.approx(((left @ weight @ right).norm() / weight.norm()).item() ** 2, rel=1e-9)
    assert norm == pytest.approx(weight.norm().item(), rel=1e-12)


@pytest.mark.parametrize(
    ("singular", "expected"), [([2.0, 2.0, 2.0], 3.0), ([5.0, 0.0, 0.0], 1.0), ([0.0, 0.0], 0.0), ([1.0], 1.0)]
)
def test_effective_rank(singular: list[float], expected: float) -> None:
    assert effective_rank(torch.tensor(singular, dtype=torch.float64)) == pytest.approx(expected)


def test_without_the_base(tiny_llama: str, tmp_path: Path, train: Train) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=3)
    save_adapter(train(base, also_train=["score"]), tmp_path / "a", base="org/base", revision="r1")
    found = inspect_adapter(tmp_path / "a")
    assert all(layer.update_norm is None and layer.u_norm > 0 for layer in found.layers)
    text = str(found)
    assert "14 layers" in text
    assert "base org/base, revision r1" in text
    assert "trained in full: score.weight [3, 32]" in text
    assert "give --base MODEL_DIR" in text
    assert "skeleton" not in text


def test_an_untrained_adapter(tiny_llama: str, tmp_path: Path, train: Train) -> None:
    model = train(_model(tiny_llama))
    for layer in adapted_layers(model).values():
        layer.core.weight.data.zero_()
    save_adapter(model, tmp_path / "a")
    for layer in inspect_adapter(tmp_path / "a", tiny_llama).layers:
        assert (layer.u_norm, layer.update_norm, layer.relative_norm, layer.effective_rank) == (0, 0, 0, 0)


def test_command(tiny_llama: str, tmp_path: Path, train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    save_adapter(train(_model(tiny_llama)), tmp_path / "a")
    main(["inspect", str(tmp_path / "a"), "--base", tiny_llama])
    table = capsys.readouterr().out
    assert str(inspect_adapter(tmp_path / "a", tiny_llama)) == table.rstrip("\n")
    lines = table.splitlines()
    assert lines[2].split()[0] == "module"
    assert len({len(line.rstrip()) <= len(lines[3]) for line in lines[2:]}) == 1
    main(["inspect", str(tmp_path / "a"), "--base", tiny_llama, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found == inspect_adapter(tmp_path / "a", tiny_llama).to_dict() | {
        "layers": [layer | {"shape": list(layer["shape"])} for layer in found["layers"]]
    }
    assert len(found["layers"][0]["singular_values"]) == 6


def test_refusals(tiny_llama: str, tmp_path: Path, train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    save_adapter(train(_model(tiny_llama)), tmp_path / "a")
    shutil.copytree(tiny_llama, tmp_path / "other")
    state = load_file(tmp_path / "other" / "model.safetensors")
    state["model.layers.1.mlp.down_proj.weight"] *= 1.0001
    save_file(state, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    for args, message in (
        ([str(tmp_path / "none")], "is not a folder"),
        ([str(tmp_path / "a"), "--base", str(tmp_path / "none")], "is not a folder"),
        (
            [str(tmp_path / "a"), "--base", str(tmp_path / "other")],
            "belongs to another base: the weights of model.layers.1.m",
        ),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["inspect", *args])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_plain_modules(tmp_path: Path, train: Train) -> None:
    base = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 4)).double()
    (tmp_path / "base").mkdir()
    save_file(base.state_dict(), tmp_path / "base" / "model.safetensors")
    save_adapter(train(base), tmp_path / "a")
    found = inspect_adapter(tmp_path / "a", tmp_path / "base")
    assert [layer.rank for layer in found.layers] == [6, 4]
    assert found.layers[1].skeleton_energy is not None
