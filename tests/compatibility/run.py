"""The run whose files `format1/` keeps, made at commit 5061510.

Command: ``python -m tests.compatibility.run tests/compatibility/format1``.

Do not make it anew: the folder stands for files that users already have.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_pmss import PMSSCallback

STEPS, STOPPED_AT = 8, 4


class Net(nn.Module):
    """Two linear layers and a head that is trained in full."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(12, 20), nn.Linear(20, 12, bias=False), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.second(torch.tanh(self.first(x))))
        return output


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.net = Net()
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = (self.net(batch[0]) - batch[1]).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.02)


def loader() -> DataLoader[Any]:
    draw = torch.Generator().manual_seed(11)
    return DataLoader(
        TensorDataset(torch.randn(16, 12, generator=draw), torch.randn(16, 3, generator=draw)), batch_size=4
    )


def fit(folder: Path, checkpoint: Path | None = None) -> Module:
    """Two epochs of four steps; a checkpoint after the first."""
    module = Module()
    callback = PMSSCallback(
        ["first", "second"], rank=5, scale=2.0, also_train=["head"], output_dir=folder, merge_on_save=None
    )
    saver = L.pytorch.callbacks.ModelCheckpoint(folder, "{step}", every_n_train_steps=STOPPED_AT, save_top_k=-1)
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=2, logger=False, callbacks=[callback, saver], enable_progress_bar=False
    )
    trainer.fit(module, loader(), ckpt_path=checkpoint)
    return module


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    trained = fit(target)
    (target / f"step={STEPS}.ckpt").unlink()
    checkpoint = torch.load(target / f"step={STOPPED_AT}.ckpt")
    checkpoint["callbacks"] = {k: v for k, v in checkpoint["callbacks"].items() if "ModelCheckpoint" not in k}  # paths
    torch.save(checkpoint, target / "checkpoint.ckpt")
    (target / f"step={STOPPED_AT}.ckpt").unlink()
    outputs = trained.net.eval()(next(iter(loader()))[0]).tolist()
    (target / "expected.json").write_text(json.dumps({"losses": trained.losses, "outputs": outputs}))
