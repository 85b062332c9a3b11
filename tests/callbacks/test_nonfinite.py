"""NaN and infinity: the step, the batch and the rank are named, and nothing good is overwritten."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_pmss import PMSSCallback
from lightning_pmss.callbacks.nonfinite import NonFiniteCheck, _gradients
from lightning_pmss.conversion.convert import adapted_layers
from tests.callbacks.toys import Toy, plain_loader, trainer


class Poisoned(Toy):
    """Gives a bad loss, or bad gradients of a good loss, for some batches (counted over all epochs)."""

    def __init__(self, bad: tuple[int, ...], value: float = float("nan"), gradient: bool = False) -> None:
        super().__init__()
        self.bad, self.value, self.gradient, self.count = bad, value, gradient, -1
        self.v: list[Tensor] = []

    def loss(self, batch: Any) -> Tensor:
        loss = super().loss(batch)
        if not self.training:
            return loss
        self.count += 1
        if self.count not in self.bad:
            return loss
        if self.gradient:
            hooked = loss * 1.0
            hooked.register_hook(lambda grad: grad * self.value)
            return hooked
        return loss * self.value

    def on_train_batch_end(self, *args: Any) -> None:
        self.v.append(self.net[0].core.weight.detach().clone())


class ByHand(Poisoned):
    """Manual optimization, a step every two batches."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        self.manual_backward(self.loss(batch))
        if batch_idx % 2:
            optimizer.step()
            optimizer.zero_grad()


def fit(folder: Path, module: Toy, *more: Any, action: Any = "stop", **options: Any) -> Toy:
    callback = PMSSCallback(rank=6, output_dir=folder / "out", on_nonfinite=action)
    trainer(folder, callback, *more, **options).fit(module, plain_loader(), plain_loader())
    return module


@pytest.mark.parametrize(
    ("made", "options", "where"),
    [
        (lambda: Poisoned((8,)), {}, r"the loss of batch 2 in epoch 1 is NaN or infinite \(optimizer step 8\)"),
        (lambda: Poisoned((8,), float("inf")), {}, r"the loss of batch 2 in epoch 1 is"),
        (lambda: Poisoned((4,)), {"accumulate_grad_batches": 3}, r"the loss of batch 4 in epoch 0 .*step 1\)"),
        (lambda: ByHand((4,)), {}, r"the loss of batch 4 in epoch 0 .*step 2\)"),
        (
            lambda: Poisoned((8,), float("inf"), gradient=True),
            {},
            r"gradients \(`net\.0\.core\.weight`, `net\.2\.core\.weight`\) of batch 2 in epoch 1 .* though the loss is",
        ),
        (
            lambda: Poisoned((7,), gradient=True),
            {"accumulate_grad_batches": 3},
            r"gradients \(.*\) of batches 0 to 2 in epoch 1",
        ),
    ],
)
def test_the_training_stops_before_the_step(tmp_path: Path, made: Any, options: Any, where: str) -> None:
    module = made()
    with pytest.raises(RuntimeError, match=where):
        fit(tmp_path, module, ModelCheckpoint(tmp_path / "saved", every_n_train_steps=1, save_last=True), **options)
    assert all(p.isfinite().all() for p in module.parameters())
    assert torch.equal(module.net[0].core.weight, module.v[-1])
    saved = torch.load(tmp_path / "saved" / "last.ckpt")
    assert torch.equal(saved["state_dict"]["net.0.core.weight"], module.v[-1])
    state = saved["optimizer_states"][0]["state"].values()
    assert all(value.isfinite().all() for entry in state for value in entry.values())


def test_the_first_batch_is_named_with_its_layers(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"first step: `net\.0`, `net\.2` \(batch 0 in epoch 0\)"):
        fit(tmp_path, Poisoned((0,)))
    module = Poisoned((0,))
    with pytest.warns(UserWarning, match="batch 0 in epoch 0 .*The step is left out"):
        fit(tmp_path, module, action="skip", max_epochs=1)
    assert not module.v[0].any()
    assert module.v[-1].any()


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_skipped_steps_change_nothing_and_are_counted(tmp_path: Path, gradient: bool, accumulate: int) -> None:
    module, reference = Poisoned((4, 9), gradient=gradient), Poisoned(())
    options: dict[str, Any] = {"accumulate_grad_batches": accumulate, "max_epochs": 2}
    with pytest.warns(UserWarning, match=r"The step is left out, the 2\. so far"):
        fit(tmp_path, module, action="skip", **options)
    fit(tmp_path / "plain", reference, **options)
    assert all(torch.equal(a, b) for a, b in zip(module.v[:4], reference.v, strict=False))
    assert torch.equal(module.v[3 + accumulate], module.v[3])
    assert not torch.equal(module.v[-1], module.v[3])
    assert all(p.isfinite().all() for p in module.parameters())
    assert (tmp_path / "out" / "adapter").is_dir()


def test_skipping_in_manual_optimization(tmp_path: Path) -> None:
    module = ByHand((4,))
    with pytest.warns(UserWarning, match=r"batch 4 in epoch 0 .*The step is left out, the 1\. so far"):
        fit(tmp_path, module, action="skip", max_epochs=1)
    assert torch.equal(module.v[5], module.v[3])
    assert all(p.isfinite().all() for p in module.parameters())


def test_a_run_that_only_skips_ends(tmp_path: Path) -> None:
    module = Poisoned(tuple(range(2, 100)))
    with pytest.raises(RuntimeError, match="in 10 steps in a row: the training has diverged"):
        fit(tmp_path, module, action="skip")
    with pytest.raises(ValueError, match="on_nonfinite='ignore' is not known; choose one of"):
        PMSSCallback(on_nonfinite="ignore")  # type: ignore[arg-type]


def test_skip_is_refused_where_the_engine_has_the_gradients() -> None:
    with pytest.raises(MisconfigurationException, match="not possible under DeepSpeed.*'stop'"):
        NonFiniteCheck("skip", trainer(Path(), None), Toy(), {}, "zero")


class Diverges(Toy):
    """Finite losses and gradients, and an optimizer that makes V infinite in its fourth step."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float("inf") if step >= 3 else 1.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_checkpoint_of_nan_is_refused_and_the_good_ones_stay(tmp_path: Path, weights_only: bool) -> None:
    saver = ModelCheckpoint(
        tmp_path / "saved",
        "{step}",
        every_n_train_steps=1,
        save_top_k=1,
        save_last=True,
        save_weights_only=weights_only,
    )
    with pytest.raises(RuntimeError, match=r"the trained `net\.0\.core\.weight`.*NaN or infinite.*step=4\.ckpt is not"):
        fit(tmp_path, Diverges(), saver)
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == ["last.ckpt", "step=3.ckpt"]
    for file in (tmp_path / "saved").iterdir():
        assert all(value.isfinite().all() for value in torch.load(file)["state_dict"].values())
    assert not (tmp_path / "out" / "merged").exists()


def test_a_checkpoint_on_exception_is_of_what_was_good(tmp_path: Path) -> None:
    module = Poisoned((8,))
    with pytest.raises(RuntimeError, match="batch 2 in epoch 1"):
        fit(tmp_path, module, OnExceptionCheckpoint(tmp_path, "broken"), enable_checkpointing=True)
    saved = torch.load(tmp_path / "broken.ckpt")
    assert torch.equal(saved["state_dict"]["net.0.core.weight"], module.v[-1])


def test_nan_in_a_module_that_trains_in_full(tmp_path: Path) -> None:
    class Head(Poisoned):
        def __init__(self) -> None:
            super().__init__(())
            self.head = nn.Linear(16, 16)

        def loss(self, batch: Any) -> Tensor:
            loss = super().loss(batch) + self.head(batch[0]).square().mean()
            if self.count == 6:
                self.head.weight.register_hook(lambda grad: grad / 0)
            return loss

    module = Head()
    callback = PMSSCallback(rank=6, output_dir=tmp_path / "out", also_train=["head"], target_modules=["0", "2"])
    with pytest.raises(RuntimeError, match=r"gradients \(`head\.weight`\) of batch 0 in epoch 1"):
        trainer(tmp_path, callback).fit(module, plain_loader())
    assert all(p.isfinite().all() for p in module.parameters())


def test_overflows_of_a_scaler_are_its_own_affair() -> None:
    runner: Any = trainer(Path(), None)
    check = NonFiniteCheck("stop", runner, Toy(), adapted_layers(Toy()), "plain")
    check._scaled = True
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([float("inf"), 0.0])
    optimizer = torch.optim.SGD([parameter])
    check.backward(torch.tensor(float("inf")))
    assert not check.before_step(optimizer)
    assert parameter.grad is not None
    check.backward(torch.tensor(float("nan")))
    with pytest.raises(RuntimeError, match="the loss of batch"):
        check.before_step(optimizer)


def test_a_rank_without_a_part_of_a_gradient_looks_at_the_others() -> None:
    none, some = nn.Parameter(torch.zeros(0, 4)), nn.Parameter(torch.ones(2))
    none.grad, some.grad = torch.zeros(0, 4), torch.tensor([1.0, 2.0])
    found = list(_gradients(torch.optim.SGD([none, some])))
    assert [gradient.tolist() for gradient in found] == [[1.0, 2.0]]
    assert torch.nn.utils.get_total_norm(found, norm_type=float("inf")) == 2
