"""An optimizer step has the gradient of one large batch, whatever its batches are: in float64, against plain transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins.precision import MixedPrecision
from token_windows import COLLATE, LENGTHS, gradient_alone, rows_of
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_pmss.datamodules.packing import PackedCollator
from lightning_pmss.modules import CausalLMModule

Trainers = Callable[..., L.Trainer]
ROWS = rows_of(LENGTHS)
WINDOWS = [[0, 1, 2], [3, 4, 5], [6]]


class Gradients(L.Callback):
    """The gradient that each optimizer step takes, and what its batches are of its loss."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []
        self.losses: list[list[float]] = [[]]

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.steps.append({n: p.grad.clone() for n, p in pl_module.model.named_parameters() if p.grad is not None})

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses[-1].append(float(pl_module.step_part))
        if len(self.losses) == trainer.global_step:
            self.losses.append([])


def still(parameters: Any) -> torch.optim.Optimizer:
    """An optimizer under which the weights stay, so that the gradient of each step can be computed alone."""
    return torch.optim.SGD(parameters, lr=0.0)


def train(trainer: Trainers, folder: str, loader: Any, *callbacks: L.Callback, **options: Any) -> Gradients:
    seen, module = Gradients(), options.pop("module", {})
    model = CausalLMModule(folder, optimizer=still, lr_schedule="constant", warmup_ratio=0.0, generate_in=[], **module)
    trainer(callbacks=[seen, *callbacks], **{"precision": "64-true"} | options).fit(model, loader)
    return seen


def check(seen: Gradients, folder: str, windows: Sequence[Sequence[int]], rows: Any = ROWS) -> None:
    """Each step's gradient is that of one batch of all examples of its window."""
    assert len(seen.steps) == len(windows)
    for found, window in zip(seen.steps, windows, strict=True):
        expected = gradient_alone(folder, [rows[i] for i in window])
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert float((found[name] - value).norm()) <= 1e-12 * float(value.norm()), name


def batches(rows: Any = ROWS, **options: Any) -> DataLoader[Any]:
    return DataLoader(rows, collate_fn=COLLATE, **options)


def test_windows_and_the_last_short_one(tiny_gpt2: str, trainer: Trainers) -> None:
    seen = train(trainer, tiny_gpt2, batches(), accumulate_grad_batches=3)
    check(seen, tiny_gpt2, WINDOWS)
    one = train(trainer, tiny_gpt2, batches(batch_size=3))
    check(one, tiny_gpt2, WINDOWS)
    assert [sum(parts) for parts in seen.losses] == pytest.approx([sum(whole) for whole in one.losses], rel=1e-12)


class Validated(L.LightningDataModule):
    def train_dataloader(self) -> Any:
        return batches()

    def val_dataloader(self) -> Any:
        return batches()


@pytest.mark.parametrize(
    ("options", "windows"),
    [
        ({"limit_train_batches": 5}, [[0, 1, 2], [3, 4]]),
        ({"overfit_batches": 4}, [[0, 1, 2], [3]]),
        ({"max_epochs": 2}, WINDOWS * 2),
        ({"max_steps": 4, "max_epochs": -1}, [*WINDOWS, [0, 1, 2]]),
        ({"val_check_interval": 2}, WINDOWS),
        ({"reload_dataloaders_every_n_epochs": 1, "max_epochs": 2}, WINDOWS * 2),
        ({"module": {"loss_chunk": 2}}, WINDOWS),
    ],
    ids=str,
)
def test_options_of_trainer_and_module(tiny_gpt2: str, trainer: Trainers, options: Any, windows: Any) -> None:
    check(train(trainer, tiny_gpt2, Validated(), accumulate_grad_batches=3, **options), tiny_gpt2, windows)


def test_accumulation_that_changes(tiny_gpt2: str, trainer: Trainers) -> None:
    scheduler = GradientAccumulationScheduler({0: 1, 1: 4, 2: 2})
    seen = train(trainer, tiny_gpt2, batches(), scheduler, max_epochs=3)
    check(seen, tiny_gpt2, [*([i] for i in range(7)), [0, 1, 2, 3], [4, 5, 6], [0, 1], [2, 3], [4, 5], [6]])


class Endless(IterableDataset[Any]):
    """The examples, without a length."""

    def __iter__(self) -> Iterator[Any]:
        return iter(ROWS)


@pytest.mark.parametrize("limit", [None, 4])
def test_a_loader_without_a_length(tiny_gpt2: str, trainer: Trainers, limit: int | None) -> None:
    options: Any = {} if limit is None else {"limit_train_batches": limit}
    seen = train(trainer, tiny_gpt2, batches(Endless()), accumulate_grad_batches=3, max_epochs=2, **options)
    check(seen, tiny_gpt2, (WINDOWS if limit is None else [[0, 1, 2], [3]]) * 2)


class Plain:
    """No DataLoader, only iterated."""

    def __iter__(self) -> Iterator[Any]:
        return (COLLATE([row]) for row in ROWS)


@pytest.mark.parametrize("kind", ["iterable", "worker", "packed"])
def test_loaders_of_any_kind(tiny_gpt2: str, trainer: Trainers, kind: str) -> None:
    packs = [[ROWS[0], ROWS[1]], [ROWS[2]], [ROWS[3], ROWS[4]], [ROWS[5]], [ROWS[6]]]
    loader: Any = {
        "iterable": Plain(),
        "worker": batches(num_workers=1),
        "packed": DataLoader(packs, collate_fn=PackedCollator(COLLATE)),  # type: ignore[arg-type]
    }[kind]
    seen = train(trainer, tiny_gpt2, loader, accumulate_grad_batches=3)
    check(seen, tiny_gpt2, [[0, 1, 2, 3, 4], [5, 6]] if kind == "packed" else WINDOWS)


def test_batches_without_a_response_and_a_window_of_them(tiny_gpt2: str, trainer: Trainers) -> None:
    rows = rows_of([0, 5, 0, 0, 0, 2])
    seen = train(trainer, tiny_gpt2, batches(rows), accumulate_grad_batches=2)
    check(seen, tiny_gpt2, [[0, 1], [2, 3], [4, 5]], rows)
    assert not any(value.any() for value in seen.steps[1].values())


def test_clipping_sees_the_gradient_of_the_step(tiny_gpt2: str, trainer: Trainers) -> None:
    norms = []

    class Norms(L.Callback):
        def on_before_zero_grad(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
            held = [p.grad for p in pl_module.model.parameters() if p.grad is not None]
            if held:
                norms.append(float(torch.stack([g.norm() for g in held]).norm()))

    whole = [gradient_alone(tiny_gpt2, [ROWS[i] for i in window]) for window in [*WINDOWS, *WINDOWS[:2]]]
    expected = [float(torch.stack([g.norm() for g in step.values()]).norm()) for step in whole]
    clip = (min(expected) + max(expected)) / 2
    train(trainer, tiny_gpt2, batches(), Norms(), accumulate_grad_batches=3, gradient_clip_val=clip, max_epochs=2)
    assert norms == pytest.approx([min(clip, norm) for norm in expected], rel=1e-5)


@pytest.mark.parametrize("scaled", [False, True])
def test_mixed_precision(tiny_gpt2: str, trainer: Trainers, scaled: bool) -> None:
    """A loss scaler's factor is gone when the gradient is clipped and stepped."""
    scaler = torch.amp.GradScaler("cpu")
    plugins = MixedPrecision("16-mixed", "cpu", scaler) if scaled else MixedPrecision("bf16-mixed", "cpu")
    seen = train(trainer, tiny_gpt2, batches(), accumulate_grad_batches=3, precision=None, plugins=plugins)
    assert len(seen.steps) == len(WINDOWS)
    for found, window in zip(seen.steps, WINDOWS, strict=True):
        for name, value in gradient_alone(tiny_gpt2, [ROWS[i] for i in window]).items():
            assert float((found[name] - value).norm()) <= 0.02 * float(value.norm()), name


def test_what_is_shown_is_the_mean_of_the_batch(tiny_gpt2: str, trainer: Trainers) -> None:
    class Shown(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, _: int) -> None:
            own = float(pl_module.response_loss(batch)[0])
            assert float(trainer.callback_metrics["train/loss"]) == own
            assert float(outputs["loss"]) * 4 == own  # Lightning has divided it

    train(trainer, tiny_gpt2, batches(), Shown(), accumulate_grad_batches=4, precision="32-true")


def test_without_accumulation_nothing_changes(tiny_gpt2: str, trainer: Trainers) -> None:
    """The loss is the batch's mean bit for bit, and Lightning fetches as it always does."""
    seen = train(trainer, tiny_gpt2, batches(batch_size=3), precision="32-true")
    module = CausalLMModule(tiny_gpt2)
    module.configure_model()
    loader = batches(batch_size=3)
    assert [sum(losses) for losses in seen.losses[:3]] == [float(module.response_loss(b)[0]) for b in loader]


class Changing(L.Callback):
    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.accumulate_grad_batches = 2


class Forgetful(L.Callback):
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            batch["labels"][:, -1] = -100


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (Changing(), "accumulate_grad_batches was changed from 3 to 2 inside an optimizer step"),
        (Forgetful(), "batch 1 has 11 response tokens in `training_step` and had 12 in the loader"),
    ],
)
def test_what_cannot_be_exact_is_refused(tiny_gpt2: str, trainer: Trainers, callback: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        train(trainer, tiny_gpt2, batches(), callback, accumulate_grad_batches=3)


def test_a_hook_without_super_is_refused(tiny_gpt2: str, trainer: Trainers) -> None:
    class Silent(CausalLMModule):
        def on_train_start(self) -> None:
            pass

        def on_train_epoch_start(self) -> None:
            pass

    with pytest.raises(RuntimeError, match=r"call `super\(\)` in it"):
        trainer(accumulate_grad_batches=2).fit(Silent(tiny_gpt2, generate_in=[]), batches())
