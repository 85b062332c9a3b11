"""What a fit leaves where it had nothing left to train, where it is stopped, and where it fails."""

from __future__ import annotations

import os
import signal
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_pmss import PMSSCallback
from lightning_pmss.files import read_adapter
from tests import forks
from tests.callbacks import toys
from tests.killing import files

STEPS = 18  # 3 epochs of 6 batches


def fit(folder: Path, *more: L.Callback, checkpoint: Path | None = None, data: Any = None, **options: Any) -> toys.Toy:
    """A fit with dropout and validation; resumed, it starts from other random states."""
    torch.manual_seed(1 if checkpoint is None else 5)
    module = toys.Toy()
    settings = {"rank": 6, "dropout": 0.3, "output_dir": folder / "out"} | options.pop("callback", {})
    runner = toys.trainer(folder, PMSSCallback(**settings), *more, **options)
    module.runner = runner  # type: ignore[assignment]
    runner.fit(module, data or toys.Numbers(), ckpt_path=None if checkpoint is None else str(checkpoint))
    return module


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, toys.Toy]:
    """The folder of a fit that nothing disturbed, and its module."""
    folder = tmp_path_factory.mktemp("whole")
    saver = ModelCheckpoint(folder / "saved", "{step}", every_n_train_steps=6, save_top_k=-1)
    return folder, fit(folder, saver)


# -- nothing left to train ----------------------------------------------------------------------------------------------


def test_a_finished_run_that_is_resumed_writes_its_results(tmp_path: Path, whole: tuple[Path, toys.Toy]) -> None:
    """It was killed while it wrote them: Lightning's loops have nothing to do, and do not call `on_train_end`."""
    folder, _ = whole
    module = fit(tmp_path, checkpoint=folder / "saved" / "step=18.ckpt")
    assert not module.losses
    mine, theirs = files(tmp_path / "out"), files(folder / "out")
    card = "adapter/README.md"
    # That checkpoint is of before the last validation, whose loss the card of the whole run has.
    assert [line for line in mine.pop(card).splitlines() if b"val_loss" not in line] == [  # type: ignore[union-attr]
        line
        for line in theirs.pop(card).splitlines()
        if b"val_loss" not in line  # type: ignore[union-attr]
    ]
    assert mine == theirs


def test_a_merged_model_beside_the_checkpoint_is_made_up_for(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path / "saved", "{step}", every_n_train_steps=6, save_top_k=-1)
    options: dict[str, Any] = {"callback": {"merge_on_save": "checkpoint"}}
    fit(tmp_path, saver, **options)
    names = ["step=12", "step=18"]
    before = {name: files(tmp_path / "saved" / f"{name}-merged") for name in names}
    for name in names:
        for file in (tmp_path / "saved" / f"{name}-merged").iterdir():
            file.unlink()
        (tmp_path / "saved" / f"{name}-merged").rmdir()
        again = ModelCheckpoint(tmp_path / "saved", "{step}", every_n_train_steps=6, save_top_k=-1)
        fit(tmp_path, again, checkpoint=tmp_path / "saved" / f"{name}.ckpt", **options)
        assert files(tmp_path / "saved" / f"{name}-merged") == before[name]
    fit(tmp_path / "other", checkpoint=tmp_path / "saved" / "step=12.ckpt", **options)  # nothing beside another run's


class NoData(L.LightningDataModule):
    def train_dataloader(self) -> Any:
        return DataLoader(toys.inputs(3), batch_size=4, drop_last=True)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_steps": 0}, "max_steps=0"),
        ({"max_epochs": 0}, "max_epochs=0"),
        ({"limit_train_batches": 0}, "limit_train_batches=0"),
        ({"data": NoData()}, r"the training loader has no batch \(no examples, or fewer than batch_size"),
    ],
)
def test_without_any_training_there_is_a_word_and_no_file(tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    with pytest.warns(UserWarning, match=f"Nothing was trained, so that no adapter is written: {reason}"):
        fit(tmp_path, **options)
    assert not (tmp_path / "out").exists()


def test_a_second_fit_with_nothing_to_do_says_so(tmp_path: Path) -> None:
    module = fit(tmp_path)
    before = files(tmp_path / "out")
    with pytest.warns(UserWarning, match=r"this Trainer has done its max_epochs=3, max_steps=-1 in an earlier fit"):
        module.runner.fit(module, toys.Numbers())  # type: ignore[operator, union-attr]
    assert files(tmp_path / "out") == before


def test_the_tuner_writes_no_results(tmp_path: Path) -> None:
    module = toys.Toy()
    module.lr = 0.01  # type: ignore[assignment]
    runner = toys.trainer(tmp_path, PMSSCallback(rank=4, output_dir=tmp_path / "out"))
    L.pytorch.tuner.Tuner(runner).lr_find(module, toys.plain_loader(), num_training=4)
    assert not (tmp_path / "out").exists()


# -- stopped ------------------------------------------------------------------------------------------------------------


class Stop(L.Callback):
    """Raises, or sends a signal, when a hook is called for the n-th time."""

    def __init__(self, hook: str, call: int, what: BaseException | signal.Signals) -> None:
        self.calls = 0
        setattr(self, hook, self._count)
        self._call, self._what = call, what

    def _count(self, *_: Any, **__: Any) -> None:
        self.calls += 1
        if self.calls == self._call:
            if isinstance(self._what, signal.Signals):
                os.kill(os.getpid(), self._what)
            else:
                raise self._what


def stopped(folder: Path, stop: Stop, **options: Any) -> tuple[Path, BaseException]:
    """The checkpoint that a stopped run leaves, and what it ended with."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(BaseException) as caught:  # noqa: PT011 - of several kinds, looked at below
        fit(folder, stop, **options)
    signal.signal(signal.SIGINT, before[0])  # Lightning ignores it after Ctrl-C, as the process is about to end
    assert signal.getsignal(signal.SIGTERM) == before[1]
    return folder / "out" / "last-interrupted.ckpt", caught.value


MOMENTS = [
    *[(hook, 9) for hook in ("on_train_batch_start", "on_before_backward", "on_after_backward", "on_train_batch_end")],
    *[(hook, 2) for hook in ("on_train_epoch_start", "on_train_epoch_end", "on_validation_start", "on_validation_end")],
    ("on_validation_batch_start", 11),
    ("on_validation_batch_end", 11),
]


@pytest.mark.parametrize("what", [signal.SIGINT, signal.SIGTERM, KeyboardInterrupt(), ValueError("of the user")])
@pytest.mark.parametrize(("hook", "call"), MOMENTS)
def test_stopped_anywhere_it_goes_on_exactly(
    tmp_path: Path, whole: tuple[Path, toys.Toy], hook: str, call: int, what: Any
) -> None:
    checkpoint, ended = stopped(tmp_path, Stop(hook, call, what))
    if isinstance(what, signal.Signals):
        assert isinstance(ended, SystemExit)
        assert ended.code == (1 if what is signal.SIGINT else 143)
    elif isinstance(what, KeyboardInterrupt):
        assert isinstance(ended, SystemExit)
    else:
        assert ended is what
    steps = torch.load(checkpoint)["global_step"]
    assert 0 < steps < STEPS
    card = (tmp_path / "out" / "adapter" / "README.md").read_text()
    assert f"- optimizer steps: {steps}\n- not finished: stopped by " in card
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["adapter", "last-interrupted.ckpt"]
    again = fit(tmp_path, checkpoint=checkpoint)
    assert again.losses == whole[1].losses[steps:]
    assert files(tmp_path / "out") == files(whole[0] / "out")  # what the interruption left has gone


@pytest.mark.parametrize("options", [{"val_check_interval": 2}, {"max_steps": 17, "max_epochs": -1}])
@pytest.mark.parametrize(("hook", "call"), [("on_train_batch_end", 8), ("on_validation_batch_start", 3)])
@pytest.mark.parametrize("what", [signal.SIGINT, ValueError("of the user")])
def test_with_other_loops(tmp_path: Path, options: dict[str, Any], hook: str, call: int, what: Any) -> None:
    undisturbed = fit(tmp_path / "whole", **options)
    checkpoint, _ = stopped(tmp_path / "stopped", Stop(hook, call, what), **options)
    steps = torch.load(checkpoint)["global_step"]
    again = fit(tmp_path / "stopped", checkpoint=checkpoint, **options)
    assert again.losses == undisturbed.losses[steps:]
    assert files(tmp_path / "stopped" / "out") == files(tmp_path / "whole" / "out")


@pytest.mark.parametrize(("hook", "call"), [("on_before_backward", 17), ("on_validation_batch_start", 3)])
def test_the_last_validation_of_max_steps_is_let_end(tmp_path: Path, hook: str, call: int) -> None:
    """A run that is resumed with all its steps done would not validate any more, and so have other figures."""
    options: dict[str, Any] = {
        "max_steps": 17,
        "max_epochs": -1,
        "val_check_interval": 17,
        "check_val_every_n_epoch": None,
    }
    fit(tmp_path / "whole", **options)
    fit(tmp_path / "asked", Stop(hook, call, signal.SIGINT), **options)
    assert files(tmp_path / "asked" / "out") == files(tmp_path / "whole" / "out")


def test_signals_wait_for_a_whole_optimizer_step(tmp_path: Path) -> None:
    options: dict[str, Any] = {"accumulate_grad_batches": 3}
    undisturbed = fit(tmp_path / "whole", **options)
    checkpoint, _ = stopped(tmp_path / "stopped", Stop("on_train_batch_start", 2, signal.SIGINT), **options)
    assert torch.load(checkpoint)["global_step"] == 1
    again = fit(tmp_path / "stopped", checkpoint=checkpoint, **options)
    assert again.losses == undisturbed.losses[3:]


@pytest.mark.parametrize(("hook", "exact"), [("on_train_batch_start", True), ("on_before_backward", False)])
def test_an_error_between_the_batches_of_a_step(tmp_path: Path, hook: str, exact: bool) -> None:
    """Between two batches the gradients so far are kept; in the middle of one they may be of a part of it."""
    options: dict[str, Any] = {"accumulate_grad_batches": 3}
    undisturbed = fit(tmp_path / "whole", **options)
    checkpoint, _ = stopped(tmp_path / "stopped", Stop(hook, 9, ValueError("of the user")), **options)
    with warnings.catch_warnings(record=True) as caught:
        again = fit(tmp_path / "stopped", checkpoint=checkpoint, **options)
    assert (again.losses == undisturbed.losses[8:]) is exact
    said = any("whose first gradients are not in the checkpoint" in str(warning.message) for warning in caught)
    assert said is not exact


def test_in_the_middle_of_an_optimizer_step_nothing_is_saved(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Torn(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            loss = super().step(closure)
            if len(self.state) and next(iter(self.state.values()))["step"] == 5:
                raise KeyboardInterrupt
            return loss

    class Module(toys.Toy):
        def configure_optimizers(self) -> Any:
            return Torn([p for p in self.parameters() if p.requires_grad], lr=0.02)

    before = signal.getsignal(signal.SIGINT)
    saver = ModelCheckpoint(tmp_path / "saved", "{step}", every_n_train_steps=2)
    runner = toys.trainer(tmp_path, PMSSCallback(rank=4, output_dir=tmp_path / "out"), saver)
    with pytest.raises(SystemExit), caplog.at_level("INFO"):
        runner.fit(Module(), toys.Numbers())
    signal.signal(signal.SIGINT, before)
    assert "in the middle of an optimizer step" in caplog.text
    assert f"the last checkpoint is {tmp_path / 'saved' / 'step=4.ckpt'}" in caplog.text
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_an_earlier_run_is_not_replaced_by_half_of_one(tmp_path: Path) -> None:
    fit(tmp_path)
    before = files(tmp_path / "out")
    checkpoint, _ = stopped(tmp_path, Stop("on_train_batch_end", 3, signal.SIGTERM))
    assert {k: v for k, v in files(tmp_path / "out").items() if "interrupted" not in k} == before
    assert (tmp_path / "out" / "adapter-interrupted" / "adapter_model.safetensors").is_file()
    read_adapter(tmp_path / "out" / "adapter-interrupted")
    fit(tmp_path, checkpoint=checkpoint)
    assert files(tmp_path / "out") == before


def test_the_checkpoint_lies_with_the_others_and_is_found_as_the_last(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path / "saved", "{step}", every_n_train_steps=2, save_last=True)
    with pytest.raises(SystemExit):
        fit(tmp_path, Stop("on_before_backward", 5, signal.SIGTERM), saver)
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == [
        "last-interrupted.ckpt",
        "last.ckpt",
        "step=4.ckpt",
    ]
    again = ModelCheckpoint(tmp_path / "saved", "{step}", every_n_train_steps=2, save_last=True)
    module = fit(tmp_path, again, checkpoint="last")  # type: ignore[arg-type]
    assert len(module.losses) == STEPS - 5
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == ["last.ckpt", "step=18.ckpt"]


def test_before_the_first_step_there_is_nothing_to_save(tmp_path: Path) -> None:
    for what in (KeyboardInterrupt(), ValueError("of the user")):
        stopped(tmp_path, Stop("on_train_batch_start", 1, what))
        assert not (tmp_path / "out").exists()


def test_handlers_of_others_are_left_alone(tmp_path: Path) -> None:
    came = []
    before = signal.signal(signal.SIGTERM, lambda *_: came.append("TERM"))
    try:
        with pytest.raises(SystemExit):  # Lightning's way, which calls the user's handler, too
            fit(tmp_path, Stop("on_train_batch_end", 5, signal.SIGTERM))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert came == ["TERM"]


PROCESS = """
import sys, time
from pathlib import Path
from tests.callbacks import test_ending, toys

class Slow(toys.Toy):
    def training_step(self, batch, batch_idx):
        print("step", flush=True)
        time.sleep(0.2)
        return super().training_step(batch, batch_idx)

toys.Toy = Slow
test_ending.fit(Path(sys.argv[1]), data=toys.Numbers(num_workers=1), max_epochs=50)
"""


@pytest.mark.skipif(os.name != "posix", reason="process groups")
@pytest.mark.parametrize("keys", [1, 2])
def test_ctrl_c_in_a_terminal(tmp_path: Path, keys: int) -> None:
    """The terminal sends it to the workers of the loader, too. A second one stops at once."""
    with forks.Program(["-c", PROCESS, tmp_path], stream=True) as process:
        for _ in range(3):
            assert process.stdout.readline() == "step\n"
        for _ in range(keys):
            os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 1, errors
    assert (
        "Ctrl-C: PMSS stops after this step and saves what was trained. Press Ctrl-C again to stop at once." in errors
    )
    assert "Traceback" not in errors.replace("Failed to load", "")
    steps = torch.load(tmp_path / "out" / "last-interrupted.ckpt")["global_step"]
    assert f"PMSS: stopped by Ctrl-C after optimizer step {steps}." in errors
    assert f"To go on: --ckpt_path {tmp_path / 'out' / 'last-interrupted.ckpt'}" in errors
    assert (
        f"PMSS: adapter {tmp_path / 'out' / 'adapter'}. For a merged model type: python -m lightning_pmss merge"
        in errors
    )
    read_adapter(tmp_path / "out" / "adapter")
