"""The callback in a Trainer and LightningModule of your own: nothing else of the library, no language model, no download.

    python examples/callback_in_your_trainer.py [--rank 8] [--steps 400]

A small classifier is trained on points in a plane, then the plane is turned, and the same module learns that with PMSS:
the callback alone converts its linear layers, keeps them frozen, trains U, and writes adapter and merged weights. Seconds.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_pmss import PMSSCallback


class YourModule(L.LightningModule):
    """A module that knows nothing of PMSS. What it must do: give the optimizer what requires grad."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        points, labels = batch
        return F.cross_entropy(self.net(points), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([weight for weight in self.parameters() if weight.requires_grad], lr=1e-2)


def points(turn: float, seed: int) -> TensorDataset:
    """2,000 points in four sectors of two classes, turned by an angle."""
    plane = torch.randn(2000, 2, generator=torch.Generator().manual_seed(seed))
    angle = torch.atan2(plane[:, 1], plane[:, 0]) - turn
    return TensorDataset(plane, (torch.sin(2 * angle) > 0).long())


def accuracy(module: YourModule, data: TensorDataset) -> float:
    """Share of right labels."""
    module.eval()
    with torch.no_grad():
        return float((module.net(data.tensors[0]).argmax(1) == data.tensors[1]).float().mean())


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train twice and return the accuracies."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--output", type=Path, help="folder of adapter and merged weights; a temporary one by default")
    options = parser.parse_args(arguments)
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
    }
    L.seed_everything(0, verbose=False)
    module, turned = YourModule(), points(math.pi / 6, seed=1)

    L.Trainer(max_steps=options.steps, **quiet).fit(
        module, DataLoader(points(0.0, seed=0), batch_size=64, shuffle=True)
    )
    before = accuracy(module, turned)
    with tempfile.TemporaryDirectory() as scratch:
        folder = str(options.output or scratch)
        pmss = PMSSCallback(target_modules=["net.2", "net.4"], rank=options.rank, output_dir=folder)  # the one new line
        trainer = L.Trainer(max_steps=options.steps, callbacks=[pmss], **quiet)
        trainer.fit(module, DataLoader(turned, batch_size=64, shuffle=True))
        trained = sum(weight.numel() for weight in module.parameters() if weight.requires_grad)
        print(
            f"turned points: {before:.1%} before, {accuracy(module, turned):.1%} after {trained} weights were trained"
        )
        print("written:", ", ".join(sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*.*"))))
    return {"before": before, "after": accuracy(module, turned)}


if __name__ == "__main__":
    main()
