"""A run that is stopped inside an optimizer step goes on as if it had not been, or says what it has lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from token_windows import COLLATE, gradient_alone, rows_of
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_pmss import PMSSCallback
from lightning_pmss.datamodules.sampler import LengthGroupedSampler, ResumableDataLoader, TrainerProgress
from lightning_pmss.modules import CausalLMModule

Trainers = Callable[..., L.Trainer]
ROWS: Any = rows_of([1, 12, 3, 7, 2, 30, 5, 9])


class Data(L.LightningDataModule):
    """Eight batches of one example an epoch, shuffled: windows of 3, 3 and 2."""

    def train_dataloader(self) -> Any:
        assert self.trainer is not None
        return ResumableDataLoader(
            ROWS,
            sampler=LengthGroupedSampler([1] * len(ROWS), 1, seed=5),
            progress=TrainerProgress(self.trainer),
            collate_fn=COLLATE,
        )

    def val_dataloader(self) -> Any:
        return DataLoader(ROWS[:2], collate_fn=COLLATE)


class Noting(L.Callback):
    """The losses and gradients of a run, and a checkpoint after every batch and every validation."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.losses: list[float] = []
        self.steps: list[dict[str, Tensor]] = []

    def _save(self, trainer: L.Trainer, when: str) -> None:
        if self.folder is not None and not trainer.sanity_checking:
            trainer.save_checkpoint(self.folder / f"{when}{len(self.losses)}.ckpt")

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.steps.append({n: p.grad.clone() for n, p in pl_module.model.named_parameters() if p.grad is not None})

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))
        self._save(trainer, "batch")

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._save(trainer, "validation")


def test_resuming_anywhere_equals_never_stopping(tiny_llama: str, trainer: Trainers, tmp_path: Path) -> None:
    def run(noting: Noting, checkpoint: Path | None = None) -> dict[str, Tensor]:
        torch.manual_seed(99 if checkpoint else 1)
        module = CausalLMModule(tiny_llama, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2), generate_in=[])
        pmss = PMSSCallback(rank=8, dropout=0.3, output_dir=tmp_path / "out", merge_on_save=None)
        options: dict[str, Any] = {"max_epochs": 2, "accumulate_grad_batches": 3, "val_check_interval": 2}
        trainer(callbacks=[pmss, noting], **options).fit(module, Data(), ckpt_path=checkpoint)
        return {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}

    whole = Noting(tmp_path)
    expected = run(whole)
    for name in ("batch1", "validation2", "batch3", "validation6", "batch7", "batch8", "validation12", "batch13"):
        again = Noting()
        found = run(again, tmp_path / f"{name}.ckpt")
        assert again.losses == whole.losses[int(name.strip("batchvlidon")) :], name
        assert all(torch.equal(found[n], value) for n, value in expected.items()), name


class Begins(L.Callback):
    """Stops a run in the third batch, behind its backward pass."""

    def on_after_backward(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.fit_loop.batch_idx == 2:
            raise ArithmeticError

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        trainer.save_checkpoint(f"{trainer.default_root_dir}/stopped.ckpt")


class Counting:
    """A loader of the rows in their order, whose state is how many batches it has given; or that has none."""

    def __init__(self) -> None:
        self.given = 0

    def __len__(self) -> int:
        return len(ROWS)

    def __iter__(self) -> Iterator[Any]:
        begin, self.given = self.given, 0
        for self.given in range(begin + 1, len(ROWS) + 1):
            yield COLLATE([ROWS[self.given - 1]])
        self.given = 0


class Resumable(Counting):
    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.given = state["given"]


def still(
    trainer: Trainers, folder: str, loader: Any, *callbacks: L.Callback, checkpoint: Any = None, **more: Any
) -> None:
    """A run in float64 in which the weights stay."""
    module = CausalLMModule(folder, optimizer=lambda p: torch.optim.SGD(p, lr=0.0), generate_in=[])
    options = {"accumulate_grad_batches": 4, "precision": "64-true"} | more
    trainer(callbacks=[*callbacks], **options).fit(module, loader, ckpt_path=checkpoint)


def check(found: dict[str, Tensor], folder: str, rows: list[Any]) -> None:
    for name, value in gradient_alone(folder, rows).items():
        assert float((found[name] - value).norm()) <= 1e-12 * float(value.norm()), name


def test_loaders_that_count_what_they_gave(tiny_gpt2: str, trainer: Trainers, tmp_path: Path) -> None:
    still(trainer, tiny_gpt2, Resumable(), Noting(tmp_path))
    for done in (2, 4, 5):
        again = Noting()
        still(trainer, tiny_gpt2, Resumable(), again, checkpoint=tmp_path / f"batch{done}.ckpt")
        assert len(again.losses) == len(ROWS) - done
        for step, rows in zip(again.steps, (ROWS[:4], ROWS[4:])[done // 4 :], strict=True):
            check(step, tiny_gpt2, rows)


def test_a_loader_that_begins_anew(tiny_gpt2: str, trainer: Trainers, tmp_path: Path) -> None:
    """The step is the mean over the batches that it was made of: two before the stop, and the two that came instead."""
    still(trainer, tiny_gpt2, Counting(), Noting(tmp_path))
    again = Noting()
    still(trainer, tiny_gpt2, Counting(), again, checkpoint=tmp_path / "batch2.ckpt")
    check(again.steps[0], tiny_gpt2, [*ROWS[:2], *ROWS[:2]])


@pytest.mark.parametrize("changed", [{}, {"accumulate_grad_batches": 3}])
def test_lost_gradients_are_said(tiny_gpt2: str, trainer: Trainers, tmp_path: Path, changed: dict[str, int]) -> None:
    """Stopped behind a backward pass whose batch comes again; or resumed with another accumulation."""
    if changed:
        still(trainer, tiny_gpt2, Resumable(), Noting(tmp_path))
    else:
        with pytest.raises(ArithmeticError):
            still(trainer, tiny_gpt2, Resumable(), Begins())
    path, again = tmp_path / ("batch2.ckpt" if changed else "stopped.ckpt"), Noting()
    with pytest.warns(UserWarning, match="gradients of its first 2 of . batches are not in the checkpoint"):
        still(trainer, tiny_gpt2, Resumable(), again, checkpoint=path, **changed)
    if changed:
        check(again.steps[0], tiny_gpt2, ROWS[2:3])
