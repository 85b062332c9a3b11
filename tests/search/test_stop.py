"""A trial stops at its fraction with the schedule of the whole run, and goes on from there as if it had never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_pmss import PMSSCallback
from lightning_pmss.runs.checkpoints import newest, saver
from lightning_pmss.search.result import Result, read_result
from lightning_pmss.search.stop import CHECKPOINT, StopAtFraction
from tests.callbacks import toys

STEPS = 18  # 3 epochs of 6 batches


class Scheduled(toys.Toy):
    """With warm-up and decay over the whole run."""

    def __init__(self) -> None:
        super().__init__()
        self.rates: list[float] = []

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)
        total = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return super().training_step(batch, batch_idx)


class Validated(L.Callback):
    """Remembers at which steps it saw a validation, in checkpoints too, as `EarlyStopping` does."""

    def __init__(self) -> None:
        self.at: list[int] = []

    def state_dict(self) -> dict[str, Any]:
        return {"at": list(self.at)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.at = list(state_dict["at"])

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.at.append(trainer.global_step)


def saved_often(folder: Path) -> ModelCheckpoint:
    """The saver that a search gives a training which goes on from its fraction."""
    return ModelCheckpoint(**saver(folder, STEPS)["init_args"])


class Killed(L.Callback):
    """Ends a fit after a step, without a word to other callbacks."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise SystemExit(9)


def fit(folder: Path, fraction: float, checkpoint: str | None = None, **options: Any) -> tuple[Any, Result, list[int]]:
    torch.manual_seed(1 if checkpoint is None else 77)  # a resumed run starts from another random state
    module = options.pop("module", Scheduled)()
    untrained = options.pop("untrained", None)
    mode = options.pop("mode", "min")
    callback = PMSSCallback(rank=6, dropout=0.3, output_dir=folder / "out", merge_on_save=None)
    stop = StopAtFraction(fraction, str(folder), "val_loss", mode, untrained)
    seen = Validated()
    trainer = toys.trainer(
        folder,
        callback,
        seen,
        *options.pop("more", ()),
        stop,
        **{"enable_checkpointing": True, "num_sanity_val_steps": -1} | options,
    )
    trainer.fit(module, toys.Numbers(), ckpt_path=checkpoint)
    result = read_result(folder)
    assert result is not None
    return module, result, seen.at


def trained(module: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters() if value.requires_grad}


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2, "max_epochs": 6}, {"val_check_interval": 2}])
@pytest.mark.parametrize("fraction", [0.2, 1 / 3, 0.5])
def test_stopped_and_finished_is_never_stopped(tmp_path: Path, fraction: float, options: dict[str, Any]) -> None:
    whole, end, seen = fit(tmp_path / "whole", 1.0, **options)
    early, stopped, _ = fit(tmp_path / "early", fraction, **options)
    assert (stopped.state, stopped.checkpoint) == ("stopped", str(tmp_path / "early" / CHECKPOINT))
    assert stopped.steps == end.step == end.steps
    assert stopped.step == -(-round(fraction * stopped.steps * 1e6) // 10**6)
    assert early.rates == whole.rates[: len(early.rates)]  # the schedule is that of the whole run
    assert early.losses == whole.losses[: len(early.losses)]
    late, finished, seen_late = fit(tmp_path / "late", 1.0, stopped.checkpoint, **options)
    assert seen_late == seen  # the validation at the stop is known only where a whole run has one there
    assert early.losses + late.losses == whole.losses
    assert early.rates + late.rates == whole.rates
    assert finished.score == end.score != stopped.score
    assert (finished.state, finished.checkpoint) == (end.state, end.checkpoint) == ("ended", None)
    for name, value in trained(whole).items():
        assert torch.equal(value, trained(late)[name]), name


def test_what_is_killed_after_its_fraction_continues_from_its_own_checkpoint(tmp_path: Path) -> None:
    whole, end, _ = fit(tmp_path / "whole", 1.0)
    _, stopped, _ = fit(tmp_path / "early", 0.2)
    with pytest.raises(SystemExit):
        fit(tmp_path / "killed", 1.0, stopped.checkpoint, more=[saved_often(tmp_path / "killed"), Killed(9)])
    checkpoint = newest([tmp_path / "whole", tmp_path / "killed"], STEPS)
    assert checkpoint is not None
    late, finished, _ = fit(tmp_path / "late", 1.0, str(checkpoint), more=[saved_often(tmp_path / "late")])
    assert 0 < len(late.losses) < STEPS - stopped.step - 2  # far from the fraction
    assert late.losses == whole.losses[-len(late.losses) :]
    assert finished.score == end.score
    for name, value in trained(whole).items():
        assert torch.equal(value, trained(late)[name]), name


class Broken(Scheduled):
    """Its last validation raises."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step == STEPS - 1:
            raise OSError("no space left")
        super().validation_step(batch, batch_idx)


def test_what_is_interrupted_in_its_last_validation_has_a_score_when_it_is_resumed(tmp_path: Path) -> None:
    """With all `max_steps` done Lightning would validate no more."""
    steps = STEPS - 1
    options: dict[str, Any] = {"max_steps": steps, "max_epochs": -1, "val_check_interval": steps}
    options |= {"check_val_every_n_epoch": None, "num_sanity_val_steps": 0}
    whole, end, _ = fit(tmp_path / "whole", 1.0, **options)
    with pytest.raises(OSError, match="no space left"):
        fit(tmp_path / "broken", 1.0, more=[saved_often(tmp_path / "broken")], module=Broken, **options)
    assert (tmp_path / "broken" / "checkpoints" / "last-interrupted.ckpt").exists()
    checkpoint = newest([tmp_path / "broken"], steps)
    late, finished, _ = fit(tmp_path / "late", 1.0, str(checkpoint), **options)
    assert late.losses == whole.losses[-len(late.losses) :]
    assert (finished.state, finished.score) == ("ended", end.score)


def test_the_score_is_that_of_a_validation_at_the_stop(tmp_path: Path) -> None:
    _, result, seen = fit(tmp_path, 0.2)
    assert (result.step, seen) == (4, [4])  # 0.2 of 18, rounded up
    module = toys.Toy()
    trainer = toys.trainer(tmp_path / "again", PMSSCallback(rank=6, output_dir=tmp_path / "o", merge_on_save=None))
    found = trainer.validate(module, toys.plain_loader(), ckpt_path=str(result.checkpoint), verbose=False)
    assert found[0]["val_loss"] == pytest.approx(result.score, rel=1e-6)
    bare = toys.trainer(tmp_path / "bare", None).validate(toys.Toy(), toys.plain_loader(), verbose=False)
    assert result.untrained == pytest.approx(bare[0]["val_loss"], rel=1e-6)


def test_it_stops_before_the_least_number_of_epochs_and_where_few_epochs_validate(tmp_path: Path) -> None:
    options = {"min_epochs": 3, "check_val_every_n_epoch": 3, "num_sanity_val_steps": 0}
    _, result, seen = fit(tmp_path, 0.2, **options)
    assert (result.step, seen, result.state) == (4, [4], "stopped")


@pytest.mark.parametrize(("steps", "stop"), [(60, 12), (10, 2), (7, 2), (3, 1)])
def test_the_fraction_is_rounded_up_and_not_by_floating_point(tmp_path: Path, steps: int, stop: int) -> None:
    _, result, _ = fit(tmp_path, 0.2, max_steps=steps, max_epochs=-1)
    assert (result.step, result.steps) == (stop, steps)


def test_a_loss_above_the_untrained_model_s_ends_the_trial_at_once(tmp_path: Path) -> None:
    class Wild(Scheduled):
        def __init__(self) -> None:
            super().__init__()
            self.lr = 30.0

    module, result, seen = fit(tmp_path, 0.5, module=Wild, val_check_interval=2)
    assert seen == [2]
    assert len(module.losses) == 2
    assert (result.state, result.score, result.checkpoint) == ("diverged", None, None)
    assert "above the untrained model's" in result.message
    _, result, seen = fit(tmp_path / "more-is-better", 0.5, module=Wild, val_check_interval=2, mode="max")
    assert (result.state, seen) == ("stopped", [2, 4, 6, 8, 9][: len(seen)])


def test_a_loss_that_is_nan_is_a_divergence(tmp_path: Path) -> None:
    class Broken(Scheduled):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            bad = not self.trainer.sanity_checking
            self.log("val_loss", self.loss(batch) * (float("nan") if bad else 1.0))

    module, result, _ = fit(tmp_path, 0.5, module=Broken, val_check_interval=2, mode="max")
    assert (result.state, result.message) == ("diverged", "val_loss at optimizer step 2 is nan")
    assert len(module.losses) == 2


def test_a_training_loss_that_is_nan_is_a_divergence(tmp_path: Path) -> None:
    class Broken(Scheduled):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return super().training_step(batch, batch_idx) * (float("nan") if self.trainer.global_step == 3 else 1.0)

    with pytest.raises(RuntimeError, match="NaN or infinite"):
        fit(tmp_path, 0.5, module=Broken)
    result = read_result(tmp_path)
    assert result is not None
    assert (result.state, result.step, result.score) == ("diverged", 3, None)
    assert "NaN or infinite" in result.message


def test_another_callback_may_end_the_training_before(tmp_path: Path) -> None:
    class Enough(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step >= 2

    stop = StopAtFraction(0.9, str(tmp_path), "val_loss")
    callback = PMSSCallback(rank=4, output_dir=tmp_path / "out", merge_on_save=None)
    toys.trainer(tmp_path, callback, Enough(), stop, enable_checkpointing=True).fit(toys.Toy(), toys.Numbers())
    result = read_result(tmp_path)
    assert result is not None
    assert (result.state, result.step, result.checkpoint) == ("ended", 2, None)
    assert result.score is not None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"limit_val_batches": 0}, "has no validation"),
        ({"max_epochs": -1}, "trainings with an end"),
        ({"monitor": "val/accuracy"}, "logs no 'val/accuracy'. Its metrics are: .*val_loss"),
    ],
)
def test_what_has_no_score_is_refused(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    stop = StopAtFraction(0.5, str(tmp_path), options.pop("monitor", "val_loss"))
    callback = PMSSCallback(rank=4, output_dir=tmp_path / "out", merge_on_save=None)
    trainer = toys.trainer(tmp_path, callback, stop, enable_checkpointing=True, **options)
    with pytest.raises(MisconfigurationException, match=said):
        trainer.fit(toys.Toy(), toys.Numbers())
    assert read_result(tmp_path) is None


@pytest.mark.parametrize("fraction", [0.0, -1.0, 1.5, float("nan")])
def test_a_fraction_that_is_none(tmp_path: Path, fraction: float) -> None:
    with pytest.raises(ValueError, match="a share of the training"):
        StopAtFraction(fraction, str(tmp_path))
