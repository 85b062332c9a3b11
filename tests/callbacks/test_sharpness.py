"""SAM and BSAM with Lightning's automatic optimization: a step is one, over the whole window, and hooks see it once."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loops.optimization.automatic import _AutomaticOptimization
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from lightning_pmss import METHODS, AdapterCallback, PMSSCallback
from lightning_pmss.callbacks import FlatLoRA, SharpnessPasses
from lightning_pmss.callbacks.nonfinite import NonFiniteError
from lightning_pmss.layers import weight_noise
from lightning_pmss.layers.weight_noise import draw
from lightning_pmss.optimizers import BSAM, SAM
from tests.callbacks.toys import Numbers, Toy, inputs, trainer

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


@pytest.mark.parametrize("config", [method.config_class for method in METHODS.values()], ids=METHODS)
def test_windows_with_every_method(tmp_path: Path, config: Any) -> None:
    make = functools.partial(BSAM, base_optimizer=functools.partial(SGD, lr=0.01), rho_max=0.1, rho_min=0.1)
    whole, parts = Sharp(make), Sharp(make)
    for module, size, batches in ((whole, 12, 1), (parts, 4, 3)):
        callback = AdapterCallback(config(rank=4), merge_on_save=None)
        fit(tmp_path, module, size, callback, accumulate_grad_batches=batches)
    for found, expected in zip(trained(parts), trained(whole), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)


class Watching(Sharp):
    """Notes what happens in which order, logs, and has a metric, BatchNorm and dropout."""

    def __init__(self, make: Any, dropout: float = 0.0) -> None:
        super().__init__(make, dropout)
        self.net.insert(1, nn.BatchNorm1d(32).double())
        self.metric = MeanMetric()
        self.events: list[str] = []
        self.masks: list[Tensor] = []
        self.shown: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.events.append(f"step {batch_idx}")
        x, batch[0] = batch[0], torch.zeros_like(batch[0])  # a step may change its batch
        self.masks.append(nn.functional.dropout(torch.ones(32), 0.5))
        loss = self.loss([x])
        self.losses.append(loss.item())
        self.metric(loss.detach())
        self.log("mean", self.metric, on_step=False, on_epoch=True)
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.events.append("optimizer step")
        super().optimizer_step(*args, **kwargs)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.events.append("before optimizer step")

    def on_before_backward(self, loss: Tensor) -> None:
        self.events.append("backward")
        torch.rand(1)  # further passes, which leave the hook out, must not shift what comes after them

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        self.events.append("clip")

    def on_train_batch_end(self, *args: Any) -> None:
        kept = getattr(self.trainer.fit_loop.epoch_loop.automatic_optimization, "batches", [])
        assert len(kept) in (0, self.trainer.fit_loop.epoch_loop.batch_progress.current.ready % 3)
        self.shown.append(float(self.trainer.callback_metrics["loss_step"]))


def test_hooks_logs_metrics_and_statistics_see_a_step_once(tmp_path: Path) -> None:
    module, plain = Watching(MAKERS["bsam"]), Watching(SGD)
    for one in (module, plain):
        one.lr = 0.0
        one.make = functools.partial(BSAM, base_optimizer=still) if one is module else still
        run = fit(tmp_path, one, 4, SharpnessPasses(), max_epochs=1, accumulate_grad_batches=3)
        assert run.global_step == 2
        one.shown.append(float(run.callback_metrics["loss_epoch"]))
        one.shown.append(float(run.callback_metrics["mean"]))
    assert [event for event in plain.events if event.startswith("step")] == [f"step {i}" for i in range(6)]
    again = ["step 0", "step 1", "step 2"] * 2
    first = ["step 0", "backward", "step 1", "backward", "optimizer step", "step 2", "backward"]
    assert module.events[:15] == [*first, *again, "before optimizer step", "clip"]
    at_w, above, below = (sum(module.losses[start : start + 3]) for start in (0, 3, 6))
    assert above > at_w > below  # so these are the batches of the first pass, which changed its own ones
    assert [e for e in module.events if not e.startswith("step")] == [
        e for e in plain.events if not e.startswith("step")
    ]
    assert module.shown == plain.shown
    assert all(torch.equal(a, b) for a, b in zip(module.buffers(), plain.buffers(), strict=True))
    assert float(plain.net[1].running_mean.abs().max()) > 0


def still(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.0)


@pytest.mark.parametrize("same", [True, False])
def test_dropout_of_the_passes_over_a_window(tmp_path: Path, same: bool) -> None:
    module = Watching(functools.partial(BSAM, base_optimizer=still, same_dropout=same))
    plain = Watching(still)
    for one in (module, plain):
        torch.manual_seed(5)
        fit(tmp_path, one, 4, SharpnessPasses(), max_epochs=1, accumulate_grad_batches=3)
    passes = [module.masks[start : start + 3] for start in (0, 3, 6, 9)]
    for later in passes[1:3]:
        assert [torch.equal(a, b) for a, b in zip(passes[0], later, strict=True)] == [same] * 3
    assert not torch.equal(passes[0][0], passes[0][1])
    # The next window draws what it would have drawn without further passes.
    assert [torch.equal(a, b) for a, b in zip(plain.masks[3:], passes[3], strict=True)] == [same] * 3


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_only_the_final_gradient_is_clipped(tmp_path: Path, algorithm: str) -> None:
    limit = 0.02 if algorithm == "norm" else 0.002
    module, alone = Sharp(MAKERS["bsam"]), Sharp(MAKERS["bsam"])
    fit(tmp_path, module, 24, SharpnessPasses(), gradient_clip_val=limit, gradient_clip_algorithm=algorithm)
    optimizer = alone.make(alone.parameters())

    def replay() -> None:
        alone.loss([inputs(24).tensors[0]]).backward()

    for step in range(2):
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
        optimizer.zero_grad()
        replay()
        optimizer.complete(replay)
        before = [p.grad.clone() for p in alone.parameters()]
        if algorithm == "norm":
            nn.utils.clip_grad_norm_(alone.parameters(), limit)
        else:
            nn.utils.clip_grad_value_(alone.parameters(), limit)
        assert not all(torch.equal(p.grad, b) for p, b in zip(alone.parameters(), before, strict=True))
        optimizer.base_optimizer.step()
    for found, expected in zip(trained(module), trained(alone), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


class Saving(L.Callback):
    """Saves a checkpoint after a batch."""

    def __init__(self, path: Path, after: int) -> None:
        self.path, self.after = path, after

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.fit_loop.total_batch_idx + 1 == self.after:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("kind", ["sam", "bsam"])
def test_resumes_bit_by_bit(tmp_path: Path, kind: str, same: bool) -> None:
    adam = functools.partial(torch.optim.AdamW, lr=0.1)
    make = functools.partial(MAKERS[kind], base_optimizer=adam, same_dropout=same)
    options: dict[str, Any] = {"accumulate_grad_batches": 2, "max_epochs": 3}
    path = tmp_path / "saved.ckpt"
    torch.manual_seed(1)
    whole = Sharp(make, dropout=0.3)
    (tmp_path / "a").mkdir()
    trainer(tmp_path / "a", None, adapter(), Saving(path, after=8), **options).fit(whole, Numbers())
    torch.manual_seed(2)
    resumed = Sharp(make, dropout=0.3)
    run = trainer(tmp_path / "b", None, adapter(), **options)
    run.fit(resumed, Numbers(), ckpt_path=path)
    assert run.global_step == 9
    for found, expected in zip(trained(resumed), trained(whole), strict=True):
        assert torch.equal(found, expected)
    state = torch.load(path, weights_only=True)
    assert not any(name.endswith((".weight", ".bias")) and ".core." not in name for name in state["state_dict"])
    assert set(state["optimizer_states"][0]["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}


def test_a_checkpoint_inside_a_window_has_no_gradients_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "inside.ckpt"
    options: dict[str, Any] = {"accumulate_grad_batches": 2, "max_epochs": 1}
    fit(tmp_path, Sharp(MAKERS["sam"]), 4, adapter(), Saving(path, after=3), **options)
    run = trainer(tmp_path / "b", None, adapter(), **options)
    with pytest.warns(UserWarning, match="whose first gradients are not in the checkpoint"):
        run.fit(Sharp(MAKERS["sam"]), loader(4), ckpt_path=path)
    assert run.global_step == 3


class Infinite(Sharp):
    """A pass of the second step has an infinite gradient, though its loss is finite."""

    def __init__(self, make: Any, which: int) -> None:
        super().__init__(make)
        self.which, self.count = which, -1
        self.kept: list[list[Tensor]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.count += 1
        loss = super().training_step(batch, batch_idx)
        if self.count == 3 + self.which:
            loss = loss * 1.0
            loss.register_hook(lambda grad: grad * float("inf"))
        return loss

    def on_train_batch_start(self, *args: Any) -> None:
        self.kept.append([p.clone() for p in trained(self)])


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("kind", ["bsam", "published"])
def test_infinite_gradients_stop_or_skip(tmp_path: Path, kind: str, which: int) -> None:
    stopped = Infinite(MAKERS[kind], which)
    message = r"in one of the 3 passes of BSAM of batch 1 in epoch 0 are NaN or infinite .*optimizer step 1\)"
    with pytest.raises(NonFiniteError, match=message):
        fit(tmp_path / "stop", stopped, 8)
    assert all(torch.equal(a, b) for a, b in zip(trained(stopped), stopped.kept[1], strict=True))
    skipping = Infinite(MAKERS[kind], which)
    callback = PMSSCallback(rank=6, merge_on_save=None, on_nonfinite="skip")
    with pytest.warns(UserWarning, match="The step is left out"):
        run = fit(tmp_path / "skip", skipping, 8, callback)
    assert run.global_step == 6
    assert all(torch.equal(a, b) for a, b in zip(skipping.kept[2], skipping.kept[1], strict=True))
    assert all(p.isfinite().all() for p in trained(skipping))


def test_noise_of_a_step_is_the_same_in_all_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Tensor] = []

    def noting(*args: Any) -> Tensor:
        drawn.append(draw(*args))
        return drawn[-1]

    monkeypatch.setattr(weight_noise, "draw", noting)
    module = Sharp(MAKERS["bsam"])
    run = fit(tmp_path, module, 4, adapter(), FlatLoRA(sigma=0.5), accumulate_grad_batches=2, max_epochs=1)
    assert run.global_step == 3
    # Two layers; the first step has no noise yet. A batch draws for both layers, and again backwards for the second one.
    assert len(drawn) == 2 * 3 * 2 * 3
    for step in range(2):
        one = [noise for noise in drawn[step * 18 :][:18] if noise.shape == (32, 16)]
        assert len(one) == 6
        assert all(torch.equal(noise, one[0]) for noise in one)
    assert not torch.equal(drawn[0], drawn[18])


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bfloat16(tmp_path: Path, precision: str) -> None:
    """The trained tensors are float32 in both, and end near those of a training in float32; another distance shows."""
    found = {}
    for name, rho in (("32-true", 0.2), (precision, 0.2), (precision, 1e-6)):
        module = Toy()
        make = functools.partial(SAM, base_optimizer=functools.partial(SGD, lr=0.01), rho=rho)
        module.configure_optimizers = lambda m=module, make=make: make([p for p in m.parameters() if p.requires_grad])  # type: ignore
        fit(tmp_path, module, 8, precision=name)  # type: ignore[arg-type]
        found[name, rho] = torch.cat([p.flatten() for p in trained(module)])
        assert found[name, rho].dtype == torch.float32
    exact, near, other = found["32-true", 0.2], found[precision, 0.2], found[precision, 1e-6]
    assert (near - exact).norm() < 0.05 * exact.norm()
    assert (near - exact).norm() < 0.5 * (near - other).norm()


def test_muon_inside_refuses_packed_cores(tmp_path: Path) -> None:
    muon = functools.partial(torch.optim.Muon, lr=2e-4)
    module = Sharp(functools.partial(SAM, base_optimizer=muon))
    with pytest.raises(MisconfigurationException, match=r"Muon orthogonalises.*`net\.0`"):
        fit(tmp_path, module, 8, PMSSCallback(rank=6, merge_on_save=None, coordinates="rotation"))


class ByHand(Sharp):
    def __init__(self) -> None:
        super().__init__(MAKERS["sam"])
        self.automatic_optimization = False


class Iterating(Sharp):
    def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
        return self.loss(next(dataloader_iter)[0])


def test_what_is_refused(tmp_path: Path) -> None:
    sharp = MAKERS["sam"]
    with pytest.raises(RuntimeError, match=r"SAM needs the batches of a step several times.*SharpnessPasses\(\)"):
        fit(tmp_path, Sharp(sharp), 8, L.Callback())
    with pytest.raises(
        MisconfigurationException, match="SAM runs 2 passes on the batches.* `automatic_optimization = Fal"
    ):
        fit(tmp_path, ByHand(), 8)
    with pytest.raises(MisconfigurationException, match=r"Type `training_step\(self, batch, batch_idx\)`"):
        fit(tmp_path, Iterating(sharp), 8, SharpnessPasses())
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(MisconfigurationException, match="SAM is not possible with precision='16-mixed'.*bf16-mixed"):
        fit(tmp_path, Sharp(sharp), 8, plugins=plugin)


def test_a_fit_after_an_interrupted_one(tmp_path: Path) -> None:
    """The trainer of an interrupted fit goes on, with another module and optimizer."""
    broken, module, expected = (Sharp(MAKERS["sam"]) for _ in range(3))
    broken.on_before_optimizer_step = lambda optimizer: 1 / 0  # type: ignore[assignment, return-value]
    run = trainer(tmp_path, None, SharpnessPasses(), max_epochs=1, accumulate_grad_batches=3)
    with pytest.raises(ZeroDivisionError):
        run.fit(broken, loader(4))
    fit(tmp_path, expected, 4, SharpnessPasses(), max_epochs=1, accumulate_grad_batches=3)
    run.fit_loop.epoch_loop.batch_progress.reset()
    run.fit_loop.epoch_progress.reset()
    run.fit(module, loader(4))
    for found, value in zip(trained(module), trained(expected), strict=True):
        torch.testing.assert_close(found, value, rtol=1e-12, atol=0)


def test_the_loop_is_lightnings_again_afterwards(tmp_path: Path) -> None:
    for callback in (adapter(), SharpnessPasses()):
        run = fit(tmp_path, Sharp(MAKERS["sam"]), 8, callback)
        loop = run.fit_loop.epoch_loop.automatic_optimization
        assert type(loop) is _AutomaticOptimization
        run.fit_loop.epoch_progress.reset()
        run.fit(Sharp(SGD), loader(8))
        assert type(loop) is _AutomaticOptimization
