"""A trained module of a few hundred numbers, and its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_pmss import PMSSCallback
from lightning_pmss.files import save_skeleton
from lightning_pmss.modules.reloading import Reloading


class Net(nn.Module):
    """Two converted layers and a head that is trained in full."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            self.first, self.second, self.head = nn.Linear(12, 20), nn.Linear(20, 12, bias=False), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.second(torch.tanh(self.first(x))))
        return output


class Module(Reloading):
    """Trains `Net`."""

    def __init__(self) -> None:
        super().__init__()
        self.keep_arguments({})
        self.net = Net()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.net(batch[0]) - 1).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.02)


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(inputs()), batch_size=4)


def inputs() -> Tensor:
    return torch.randn(8, 12, generator=torch.Generator().manual_seed(11))


def make_trainer(folder: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "max_steps": 2, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "default_root_dir": folder,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
    }  # fmt: skip
    return L.Trainer(**settings | options, callbacks=list(callbacks))


def make_callback(folder: Path) -> PMSSCallback:
    return PMSSCallback(
        ["first", "second"], rank=5, scale=2.0, also_train=["head"], output_dir=folder, merge_on_save=None
    )


class Files(NamedTuple):
    """What a run leaves, and what it started from.

    Attributes:
        base: State dict of the module's base.
        adapter: Its adapter folder.
        skeleton: A skeleton file of it.
        checkpoint: The checkpoint of the last step.
        outputs: Of the trained module on `inputs`.
    """

    base: Path
    adapter: Path
    skeleton: Path
    checkpoint: Path
    outputs: Tensor


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("fuzzed")
    save_file(Module().state_dict(), folder / "base.safetensors")
    module = Module()
    saver = ModelCheckpoint(folder, "last", save_top_k=1, every_n_train_steps=2)
    make_trainer(folder, make_callback(folder), saver).fit(module, loader())
    save_skeleton(module, folder / "skeleton.safetensors")
    with torch.no_grad():
        outputs = module.net(inputs())
    return Files(
        folder / "base.safetensors", folder / "adapter", folder / "skeleton.safetensors", folder / "last.ckpt", outputs
    )
