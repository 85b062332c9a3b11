"""Weights near the ends of a dtype's range: trained right, or refused by name before the model is touched."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_pmss import PMSSCallback, PMSSConfig, convert
from lightning_pmss.files.select import select_files
from lightning_pmss.methods.pmss.config import COORDINATES
from lightning_pmss.methods.pmss.coordinates import coordinate_frame
from lightning_pmss.methods.pmss.selection import SELECTORS, select_skeleton

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
OUT, IN, RANK = 32, 24, 8


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def model(dtype: torch.dtype, size: float) -> nn.Sequential:
    net = nn.Sequential(nn.Linear(IN, OUT, dtype=dtype), nn.Linear(OUT, 4, dtype=dtype))
    with torch.no_grad():
        net[0].weight.copy_(gaussian(OUT, IN) * size)
        net[0].bias.zero_()  # type: ignore[union-attr]
    return net


def config(coordinates: str, selection: str = "lupp", **options: Any) -> PMSSConfig:
    return PMSSConfig(target_modules=["0"], rank=RANK, coordinates=coordinates, selection=selection, **options)


WORKS = [
    (F32, 1e-15),
    (F32, 1e-4),
    (F32, 1e4),
    (F32, 1e13),
    (BF16, 1e-12),
    (F16, 0.01),
    (F16, 3),
    (F64, 1e100),
    (F64, 1e-100),
]


@pytest.mark.parametrize(
    ("dtype", "size", "coordinates"),
    [
        *((dtype, size, coordinates) for dtype, size in WORKS for coordinates in ("orthonormal", "spectral")),
        # Raw coordinates add V / |W|^-2, a rotation turns what is there: of such weights they make no usual updates.
        *((dtype, 0.03, coordinates) for dtype in (F32, BF16, F16, F64) for coordinates in ("raw", "rotation")),
    ],
)
def test_what_is_converted_learns_and_equals_float64(dtype: torch.dtype, size: float, coordinates: str) -> None:
    net = model(dtype, size)
    convert(net, config(coordinates, scale=1.0))
    layer = net[0]
    x = (gaussian(64, IN, seed=1) * min(1.0, 1 / size)).to(dtype)
    before = layer.core.weight.detach().clone()
    wanted = gaussian(64, OUT, seed=2)
    optimizer = torch.optim.SGD([layer.core.weight], lr=0.0)
    for _ in range(5):
        loss = (layer(x).double() - wanted).square().mean()
        (loss * (1024 if dtype == F16 else 1)).backward()
        grad = layer.core.weight.grad
        assert grad is not None
        assert bool(grad.isfinite().all())
        with torch.no_grad():
            layer.core.weight -= 0.02 * grad / grad.abs().max()  # Adam's first steps, whatever the gradient's size
        optimizer.zero_grad()
    assert float((layer.core.weight - before).abs().max()) > 0.05
    w, u = layer.weight.detach().double(), layer.core_update().detach().double()
    change = w[:, layer.cols] @ (u @ (w[layer.rows] @ x.double().T))
    exact = (w @ x.double().T + change).T
    assert (
        float((layer(x).double() - exact).norm() / exact.norm()) < {F16: 0.02, BF16: 0.05, F32: 1e-5, F64: 1e-12}[dtype]
    )


REFUSED = [
    (F32, 1e-40),
    (F32, 1e-30),
    (F32, 3e37),
    (BF16, 1e-30),
    (BF16, 1e38),
    (F16, 1e-7),
    (F16, 1e4),
    (F64, 1e-300),
    (F64, 1e300),
]


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize(("dtype", "size"), REFUSED)
def test_refused_by_name_and_the_model_stays_as_it_was(dtype: torch.dtype, size: float, coordinates: str) -> None:
    net = model(dtype, min(size, 0.24 * torch.finfo(dtype).max))
    assert bool(net[0].weight.isfinite().all())
    before = copy.deepcopy(net.state_dict())
    kind = str(dtype).removeprefix("torch.")
    for selection in SELECTORS:
        with pytest.raises(
            ValueError, match=rf"`0` cannot be trained in {kind}: an update of weights of this size .*clude this"
        ):
            convert(net, config(coordinates, selection))
    assert type(net[0]) is nn.Linear
    assert all(p.requires_grad for p in net.parameters())
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    report = convert(net, PMSSConfig(rank=4, exclude_modules=["0"]))
    assert [layer.name for layer in report.layers] == ["1"]


def test_float16_names_the_wider_dtypes_and_they_work() -> None:
    with pytest.raises(ValueError, match="load the model in float32 or bfloat16, or exclude this module"):
        convert(model(F16, 1e-5), config("orthonormal"))
    for dtype in (F32, BF16):
        convert(model(F16, 1e-5).to(dtype), config("orthonormal"))


@pytest.mark.parametrize("selection", sorted(SELECTORS))
def test_a_power_of_two_changes_no_choice_and_no_figure(selection: str) -> None:
    weight = gaussian(OUT, IN).float()
    expected = select_skeleton(weight, RANK, selection=selection)
    for power in (-60, 60):
        rows, cols = select_skeleton(weight * 2.0**power, RANK, selection=selection)
        assert torch.equal(rows, expected[0])
        assert torch.equal(cols, expected[1])
        frames = [coordinate_frame(w[:, cols], w[rows], "orthonormal", weight=w) for w in (weight, weight * 2.0**power)]
        assert torch.equal(frames[0].left, frames[1].left * 2.0**power)  # type: ignore[arg-type, operator]
        assert torch.equal(frames[0].right, frames[1].right * 2.0**power)  # type: ignore[arg-type, operator]


def test_nearly_dependent_slices_are_warned_of_and_not_refused() -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        convert(nn.Sequential(nn.Linear(32, 32, dtype=BF16)), PMSSConfig(rank=32))
    assert any("rounding would destroy" in str(w.message) for w in caught)


@pytest.mark.parametrize("coordinates", ["raw", "spectral"])
def test_rows_or_columns_of_zeros(coordinates: str) -> None:
    net = model(F32, 1.0)
    with torch.no_grad():
        net[0].weight[:, 3:] = 0
    convert(copy.deepcopy(net), config(coordinates, "norm"))  # some zero columns are of no use, and do no harm
    with torch.no_grad():
        net[0].weight[:, :] = 0
        net[0].weight[5, 5] = 1.0
    seed = next(
        s for s in range(100) if 5 not in select_skeleton(net[0].weight, 2, selection="random", seed=s, name="0")[1]
    )
    options = {"target_modules": ["0"], "rank": 2, "selection": "random", "seed": seed}
    with pytest.raises(ValueError, match="`0` has nothing but zeros in the selected columns, .*exclude this module"):
        convert(net, PMSSConfig(coordinates=coordinates, **options))
    with pytest.raises(ValueError, match=r"have only numerical rank 0 and .; set coordinates='spectral', or exclude"):
        convert(net, PMSSConfig(coordinates="orthonormal", **options))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_slices_that_are_not_finite(value: float) -> None:
    weight = gaussian(6, 5)
    weight[1, 2] = value
    for coordinates in COORDINATES:
        with pytest.raises(ValueError, match="`a.b`: the selected rows or columns hold NaN or infinite values"):
            coordinate_frame(weight[:, :3], weight[:3], coordinates, "a.b", weight=weight)


@pytest.mark.parametrize("precision", ["16-true", "32-true"])  # 16-mixed is bf16-mixed on a CPU
def test_the_dtype_that_the_trainer_computes_in_is_asked(precision: str, tmp_path: Path) -> None:
    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = model(F32, 1e-6)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad])

    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=1,
        precision=precision,  # type: ignore[arg-type]
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[PMSSCallback(rank=4, output_dir=tmp_path, merge_on_save=None)],
    )
    module = Module()
    data = DataLoader(TensorDataset(gaussian(4, IN).float()))
    if precision == "32-true":
        trainer.fit(module, data)
        assert bool(module.net[0].core.weight.isfinite().all())
        return
    with pytest.raises(ValueError, match="`net.0` cannot be trained in float16"):
        trainer.fit(module, data)
    assert type(module.net[0]) is nn.Linear


def test_selection_from_files_refuses_what_no_dtype_helps(tiny_llama: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    llama = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        llama.model.layers[1].mlp.up_proj.weight.mul_(1e-30)
    llama.save_pretrained(tmp_path / "base")
    for coordinates in COORDINATES:
        chosen = PMSSConfig(rank=4, coordinates=coordinates)
        with pytest.raises(ValueError, match="`model.layers.1.mlp.up_proj` cannot be trained in float32"):
            select_files(tmp_path / "base", tmp_path / f"{coordinates}.safetensors", chosen, progress=False)
