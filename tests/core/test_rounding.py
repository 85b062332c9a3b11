"""A skeleton whose update would not survive low precision is told, with a rank at which it does."""

from __future__ import annotations

import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn

from lightning_pmss import PMSSCallback, PMSSConfig, convert
from lightning_pmss.methods.pmss.coordinates import Frame, coordinate_frame
from lightning_pmss.methods.pmss.rounding import LIMIT, fitting_rank, rounding_error
from lightning_pmss.methods.pmss.selection import select_skeleton


def skeleton(out: int, width: int, rank: int) -> tuple[torch.Tensor, Frame]:
    weight = (torch.randn(out, width, generator=torch.Generator().manual_seed(0)) / width**0.5).bfloat16().float()
    rows, cols = select_skeleton(weight, rank)
    return weight, coordinate_frame(weight[:, cols], weight[rows], "orthonormal")


@pytest.mark.parametrize(
    ("out", "width", "rank"), [(64, 64, 64), (64, 64, 60), (64, 64, 16), (48, 64, 48), (32, 32, 32)]
)
def test_predicts_the_error_of_the_layer(out: int, width: int, rank: int) -> None:
    weight, frame = skeleton(out, width, rank)
    predicted = rounding_error(frame, torch.bfloat16)
    layer = nn.Sequential(nn.Linear(width, out, bias=False, dtype=torch.bfloat16))
    layer[0].weight.data = weight.bfloat16()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        convert(layer, PMSSConfig(rank=rank))
    nn.init.normal_(layer[0].core.weight)
    u = layer[0].core_update().detach().double()
    w = layer[0].weight.double()
    x = torch.randn(64, width)
    exact = x.double() @ (w[:, layer[0].cols] @ u @ w[layer[0].rows]).T
    # A base of zeros would hide what its own rounding adds: compare the update that comes out with the exact one.
    with torch.no_grad():
        found = layer(x.bfloat16()).double() - x.bfloat16().double() @ w.T
    measured = float((found - exact).norm() / exact.norm())
    if predicted > LIMIT:  # how bad depends on the smallest singular values alone; that it is bad must be seen
        assert measured > LIMIT / 2
    else:
        assert predicted / 8 < measured < predicted * 8 + 0.02


def test_only_a_bad_skeleton_is_over_the_limit() -> None:
    assert rounding_error(skeleton(64, 64, 16)[1], torch.bfloat16) < LIMIT / 5
    assert rounding_error(skeleton(64, 64, 64)[1], torch.bfloat16) > LIMIT
    assert rounding_error(skeleton(64, 64, 64)[1], torch.float32) < 1e-3
    assert rounding_error(Frame(gain=torch.ones(1)), torch.bfloat16) == 0.0


def test_the_rank_that_is_told_fits() -> None:
    weight, frame = skeleton(64, 64, 64)
    rank = fitting_rank(frame, torch.bfloat16)
    assert 1 < rank < 64
    rows, cols = select_skeleton(weight, rank)
    smaller = coordinate_frame(weight[:, cols], weight[rows], "orthonormal")
    assert rounding_error(smaller, torch.bfloat16) < 2 * LIMIT


def square(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 64)).to(dtype)


def test_convert_warns_on_a_bfloat16_base_alone() -> None:
    with pytest.warns(UserWarning, match=r"In bfloat16 rounding would destroy .* `0` .*rank_pattern=\{'0': \d+"):
        report = convert(square(torch.bfloat16), PMSSConfig(rank=32))
    assert report.layers[0].fitting_rank is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(square(torch.float32), PMSSConfig(rank=32))
        convert(square(torch.bfloat16), PMSSConfig(rank=32, coordinates="spectral"))
        convert(square(torch.bfloat16), PMSSConfig(rank=32, rank_pattern={"0": report.layers[0].fitting_rank, "1": 16}))


def test_callback_warns_under_mixed_precision(tmp_path_factory: pytest.TempPathFactory) -> None:
    def trainer(precision: str, rank: int) -> L.Trainer:
        folder = tmp_path_factory.mktemp("run")
        return L.Trainer(
            max_steps=1,
            accelerator="cpu",
            precision=precision,  # type: ignore[arg-type]
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            callbacks=[PMSSCallback(rank=rank, output_dir=folder, merge_on_save=None)],
        )

    class Square(BoringModel):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 2))  # type: ignore[assignment]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad])

    with pytest.warns(UserWarning, match="In bf16-mixed rounding would destroy"):
        trainer("bf16-mixed", 32).fit(Square())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*rounding would destroy")
        trainer("32-true", 32).fit(Square())
        trainer("bf16-mixed", 8).fit(Square())
