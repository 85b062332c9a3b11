"""NaN and infinity in other places than the loss: constants, running statistics, steps of one's own, optimizer states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_pmss import PMSSCallback
from lightning_pmss.callbacks.nonfinite import NonFiniteError
from tests.callbacks.test_nonfinite import Poisoned, fit
from tests.callbacks.toys import Toy, plain_loader, trainer


class Masked(Toy):
    """With a causal mask, as many models keep it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.full((4, 4), float("-inf")).triu(1))


def test_a_mask_of_infinities_is_no_divergence(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=1, save_last=True)
    module = fit(tmp_path, Masked(), saver, max_epochs=1)
    again = Masked()
    trainer(tmp_path, PMSSCallback(rank=6, output_dir=tmp_path / "again"), max_epochs=2).fit(
        again, plain_loader(), ckpt_path=tmp_path / "saved" / "last.ckpt"
    )
    assert torch.equal(again.mask, module.mask)  # type: ignore[arg-type]


def test_a_mask_that_the_adapter_would_hold_is_refused_before_training(tmp_path: Path) -> None:
    class Head(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(16, 16)
            self.head.register_buffer("mask", torch.full((4, 4), float("-inf")).triu(1))

    module = Head()
    callback = PMSSCallback(rank=6, output_dir=tmp_path, also_train=["head"], target_modules=["0", "2"])
    with pytest.raises(
        MisconfigurationException, match=r"`head\.mask` have NaN or infinite values before.*persistent="
    ):
        trainer(tmp_path, callback).fit(module, plain_loader())
    assert not module.losses


class Statistics(Poisoned):
    """The bad batch goes through a BatchNorm, and through a mean of the module's own."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.norm = nn.BatchNorm1d(16)
        self.register_buffer("mean", torch.zeros(16))
        self.means: list[Tensor] = []

    def loss(self, batch: Any) -> Tensor:
        x = batch[0] * (float("nan") if self.training and self.count + 1 in self.bad else 1.0)
        if self.training:
            self.mean.lerp_(x.mean(0), 0.1)  # type: ignore[operator]
        return super().loss((self.norm(x),))

    def on_train_batch_end(self, *args: Any) -> None:
        super().on_train_batch_end(*args)
        self.means.append(torch.stack([self.norm.running_mean, self.mean]))  # type: ignore[list-item]


@pytest.mark.parametrize("action", ["stop", "skip"])
def test_running_statistics_are_those_before_the_bad_batch(tmp_path: Path, action: str) -> None:
    module, saver = Statistics((3,)), ModelCheckpoint(tmp_path / "saved", save_last=True)
    if action == "skip":
        fit(tmp_path, module, saver, action=action)
        assert torch.equal(module.means[3], module.means[2])
        assert not torch.equal(module.means[4], module.means[3])
    else:
        with pytest.raises(NonFiniteError, match="the loss of batch 3"):
            fit(tmp_path, module, saver, action=action)
        assert (tmp_path / "saved" / "last-interrupted.ckpt").is_file()
    assert (tmp_path / "out" / "adapter").is_dir()
    now = torch.stack([module.norm.running_mean, module.mean])  # type: ignore[list-item]
    assert torch.equal(now, module.means[-1])
    assert now.isfinite().all()


class Raw(Poisoned):
    """Manual optimization that Lightning knows nothing of."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        self.loss(batch).backward()
        optimizer.step()


class Clips(Poisoned):
    """A clipping of its own that divides by zero."""

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        if self.count in self.bad:
            for parameter in optimizer.param_groups[0]["params"]:
                parameter.grad.div_(0)

    def loss(self, batch: Any) -> Tensor:
        self.value = 1.0
        return super().loss(batch)


class Huge(Poisoned):
    """Finite gradients, the squares of which are not: Adam's second moment would be infinite, and V would never move again."""

    def __init__(self, bad: tuple[int, ...]) -> None:
        super().__init__(bad, 1e30)


@pytest.mark.parametrize("kind", [Raw, Clips, Huge])
@pytest.mark.parametrize("action", ["stop", "skip"])
def test_the_last_look_is_the_optimizers(tmp_path: Path, kind: Any, action: str) -> None:
    module = kind((4,))
    if action == "stop":
        with pytest.raises(NonFiniteError, match=r"gradients \(`net\.0\.core\.weight`, .*of batch 4 in epoch 0"):
            fit(tmp_path, module)
        assert torch.equal(module.net[0].core.weight, module.v[3])
    else:
        with pytest.warns(UserWarning, match=r"The step is left out, the 1\. so far"):
            fit(tmp_path, module, action="skip")
        assert torch.equal(module.v[4], module.v[3])
        assert not torch.equal(module.v[5], module.v[4])
    assert all(p.isfinite().all() for p in module.parameters())


def test_an_infinite_gradient_is_seen_before_it_is_clipped(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="gradients .*of batch 4"):
        fit(
            tmp_path,
            Poisoned((4,), float("inf"), gradient=True),
            gradient_clip_val=1.0,
            gradient_clip_algorithm="value",
        )


@pytest.mark.parametrize(("bad", "ends"), [((3,), False), (tuple(range(2, 999)), True)])
def test_a_scaler_that_finds_no_scale_ends_the_run(tmp_path: Path, bad: tuple[int, ...], ends: bool) -> None:
    module = Poisoned(bad, float("inf"), gradient=True)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    if ends:
        with pytest.raises(NonFiniteError, match="at every scale of the loss"):
            fit(tmp_path, module, plugins=[plugin], max_epochs=12)
    else:
        fit(tmp_path, module, plugins=[plugin], max_epochs=1)
    assert all(p.isfinite().all() for p in module.parameters())
