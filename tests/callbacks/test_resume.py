"""Resuming from a checkpoint gives the losses of the run that was never stopped, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_pmss import PMSSCallback
from tests import forks
from tests.callbacks import toys

STEPS = 18  # 3 epochs of 6 batches, checkpoints at 4, 8, 12 (the end of an epoch) and 16


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2, "max_epochs": 4}, {"val_check_interval": 2}])
def test_resume_equals_never_stopped(tmp_path: Path, late: bool, options: dict[str, Any]) -> None:
    whole = toys.fit(tmp_path / "whole", None, late, options)
    for checkpoint in sorted((tmp_path / "whole" / "checkpoints").glob("*.ckpt")):
        loops = torch.load(checkpoint)["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]
        done = loops["processed"]
        resumed = toys.fit(tmp_path / checkpoint.stem, str(checkpoint), late, options)
        assert resumed == whole[done:], checkpoint.name


class Scheduled(toys.Toy):
    """Asks for the number of steps, for which Lightning makes the loaders before it reads the checkpoint."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        steps = int(self.trainer.estimated_stepping_batches)
        return [optimizer], [torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=steps)]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_resume_of_a_module_that_asks_for_the_number_of_steps(tmp_path: Path, num_workers: int) -> None:
    def run(folder: Path, checkpoint: Path | None) -> list[float]:
        torch.manual_seed(1)
        module = Scheduled()
        callback = PMSSCallback(rank=6, dropout=0.3, output_dir=folder, merge_on_save=None)
        saver = L.pytorch.callbacks.ModelCheckpoint(folder, "{step}", every_n_train_steps=4, save_top_k=-1)
        toys.trainer(folder, callback, saver, max_epochs=2).fit(module, toys.Numbers(num_workers), ckpt_path=checkpoint)
        return module.losses

    whole = run(tmp_path, None)
    for step in (4, 8):
        assert run(tmp_path / str(step), tmp_path / f"step={step}.ckpt") == whole[step:]


def test_resumed_twice(tmp_path: Path) -> None:
    """From the end of an epoch, where Lightning forgets to count the next one, and then from inside of that one."""
    whole = toys.fit(tmp_path / "whole", None, False, {})
    again = toys.fit(tmp_path / "again", str(tmp_path / "whole" / "checkpoints" / "step=12.ckpt"), False, {})
    assert again == whole[12:]
    assert (
        toys.fit(tmp_path / "more", str(tmp_path / "again" / "checkpoints" / "step=16.ckpt"), False, {}) == whole[16:]
    )


def test_resume_inside_an_optimizer_step(tmp_path: Path) -> None:
    """Lightning forgets the gradients so far, and makes the step of the batches that are left."""

    class Each(L.Callback):
        def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if not trainer.sanity_checking:
                trainer.save_checkpoint(Path(trainer.default_root_dir) / f"{trainer.fit_loop.total_batch_idx}.ckpt")

    def run(folder: Path, checkpoint: Path | None) -> list[float]:
        torch.manual_seed(1 if checkpoint is None else 9)
        module = toys.Toy()
        callback = PMSSCallback(rank=6, dropout=0.3, output_dir=folder / "out", merge_on_save=None)
        options: dict[str, Any] = {"accumulate_grad_batches": 4, "val_check_interval": 1, "max_epochs": 2}
        toys.trainer(folder, callback, Each(), **options).fit(module, toys.Numbers(), ckpt_path=checkpoint)
        return module.losses

    whole = run(tmp_path / "whole", None)
    found = sorted((tmp_path / "whole").glob("*.ckpt"))
    assert len(found) == len(whole) == 12
    for path in found:
        assert run(tmp_path / path.stem, path) == whole[int(path.stem) + 1 :], path.name


def test_resume_in_a_new_process(tmp_path: Path) -> None:
    whole = toys.fit(tmp_path / "whole", None, False, {})
    assert len(whole) == STEPS
    checkpoint = tmp_path / "whole" / "checkpoints" / "step=8.ckpt"
    (tmp_path / "again").mkdir()
    forks.run(["-m", "tests.callbacks.toys", tmp_path / "again", checkpoint, "early", "{}"]).check_returncode()
    assert json.loads((tmp_path / "again" / "losses.json").read_text()) == whole[8:]


def test_dropout_matters_for_this_test(tmp_path: Path) -> None:
    """Without the saved random states the resumed losses differ: the equality above is not for lack of randomness."""
    whole = toys.fit(tmp_path / "whole", None, False, {})
    path = tmp_path / "whole" / "checkpoints" / "step=8.ckpt"
    checkpoint = torch.load(path)
    key = next(k for k in checkpoint["callbacks"] if "PMSSCallback" in k)
    del checkpoint["callbacks"][key]
    torch.save(checkpoint, tmp_path / "forgetful.ckpt")
    assert toys.fit(tmp_path / "again", str(tmp_path / "forgetful.ckpt"), False, {}) != whole[8:]


def test_end_of_epoch_checkpoint_of_a_foreign_shuffled_loader(tmp_path: Path) -> None:
    """The order of the next epoch is drawn from the global generator when it begins."""

    def run(folder: Path, checkpoint: str | None) -> list[float]:
        torch.manual_seed(99 if checkpoint else 1)
        module = toys.Toy()
        callback = PMSSCallback(rank=6, dropout=0.3, output_dir=folder, merge_on_save=None)
        saver = L.pytorch.callbacks.ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        loader = torch.utils.data.DataLoader(toys.inputs(), batch_size=toys.BATCH, shuffle=True)
        toys.trainer(folder, callback, saver).fit(module, loader, ckpt_path=checkpoint)
        return module.losses

    whole = run(tmp_path / "whole", None)
    for epoch in (0, 1):
        assert run(tmp_path / str(epoch), str(tmp_path / "whole" / f"epoch={epoch}.ckpt")) == whole[6 * (epoch + 1) :]


def test_foreign_loader_in_the_middle_of_an_epoch_is_said(tmp_path: Path) -> None:
    def run(folder: Path, checkpoint: str | None) -> None:
        saver = L.pytorch.callbacks.ModelCheckpoint(folder, "{step}", every_n_train_steps=4, save_top_k=-1)
        callback = PMSSCallback(rank=4, output_dir=folder, merge_on_save=None)
        trainer = toys.trainer(folder, callback, saver)
        trainer.fit(toys.Toy(), toys.plain_loader(), ckpt_path=checkpoint)

    run(tmp_path / "whole", None)
    with pytest.warns(UserWarning, match="`DataLoader` cannot continue where it stopped"):
        run(tmp_path / "again", str(tmp_path / "whole" / "step=4.ckpt"))


def test_python_and_numpy_states_come_back(tmp_path: Path) -> None:
    import random

    import numpy as np

    from lightning_pmss.random_states import random_states, set_random_states

    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    torch.save(random_states(), tmp_path / "states.pt")  # loads with weights_only=True, as checkpoints do
    drawn = random.random(), random.gauss(0, 1), np.random.rand(), torch.rand(2).tolist()
    set_random_states(torch.load(tmp_path / "states.pt"))
    assert drawn == (random.random(), random.gauss(0, 1), np.random.rand(), torch.rand(2).tolist())
