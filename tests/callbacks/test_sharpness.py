"""SAM and BSAM with Lightning's automatic optimization: a step is one, over the whole window, and hooks see it once."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_pmss import PMSSCallback
from lightning_pmss.callbacks import SharpnessPasses
from lightning_pmss.optimizers import BSAM, SAM
from tests.callbacks.toys import Toy, inputs, trainer

SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
MAKERS = {
    "sam": functools.partial(SAM, base_optimizer=SGD, rho=0.3),
    "bsam": functools.partial(BSAM, base_optimizer=SGD, rho_max=0.3, rho_min=0.2),
    "published": functools.partial(BSAM, base_optimizer=SGD, rho_max=0.3, rho_min=0.2, published=True),
}


class Sharp(Toy):
    """A toy in float64 with one of the optimizers."""

    def __init__(self, make: Any, dropout: float = 0.0) -> None:
        super().__init__()
        self.make = make
        self.net = self.net.double()
        if dropout:
            self.net.append(nn.Dropout(dropout))

    def loss(self, batch: Any) -> Tensor:
        return super().loss([batch[0].double()])

    def configure_optimizers(self) -> Any:
        optimizer = self.make([p for p in self.parameters() if p.requires_grad])
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def adapter() -> PMSSCallback:
    return PMSSCallback(rank=6, merge_on_save=None)


def loader(size: int, count: int = 24) -> DataLoader[Any]:
    return DataLoader(inputs(count), batch_size=size)


def trained(module: nn.Module) -> list[Tensor]:
    return [p.detach() for p in module.parameters() if p.requires_grad]


def fit(folder: Path, module: Sharp, size: int, *callbacks: L.Callback, count: int = 24, **options: Any) -> L.Trainer:
    folder.mkdir(exist_ok=True)
    given: Iterable[L.Callback] = callbacks or [adapter()]
    run = trainer(folder, None, *given, **{"max_epochs": 2, **options})
    run.fit(module, loader(size, count))
    return run


@pytest.mark.parametrize("kind", MAKERS)
def test_equals_a_loop_of_ones_own(tmp_path: Path, kind: str) -> None:
    module, alone = Sharp(MAKERS[kind]), Sharp(MAKERS[kind])
    run = fit(tmp_path, module, 8, SharpnessPasses())
    optimizer = alone.make(alone.parameters())
    for step in range(6):
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
        batch = [inputs(24).tensors[0][step % 3 * 8 :][:8]]

        def closure(batch: Any = batch) -> Tensor:
            optimizer.zero_grad()
            loss = alone.loss(batch)
            loss.backward()
            return loss

        optimizer.step(closure)
    assert run.global_step == 6
    for found, expected in zip(trained(module), trained(alone), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.05}], ids=["free", "clipped"])
def test_a_window_equals_its_large_batch(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    whole, parts = Sharp(MAKERS[kind]), Sharp(MAKERS[kind])
    runs = [fit(tmp_path, whole, 12, **options), fit(tmp_path, parts, 4, accumulate_grad_batches=3, **options)]
    assert [run.global_step for run in runs] == [4, 4]
    for found, expected in zip(trained(parts), trained(whole), strict=True):
        assert float(expected.abs().max()) > 1e-3
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-14)
