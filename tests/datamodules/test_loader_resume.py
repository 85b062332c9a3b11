"""A run resumed from any checkpoint sees the batches that the uninterrupted run saw."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import resume_script as script  # the same file runs as a script, in a process of its own

from tests import forks

STEPS = {"every_n_train_steps": 2}
EPOCH_END = {"every_n_epochs": 1, "save_on_train_epoch_end": True}
VALIDATION = {"every_n_epochs": 1, "save_on_train_epoch_end": False}
BY_STEPS = {"max_epochs": -1, "max_steps": 18}

KINDS = {
    "steps": (STEPS, {}),
    "steps, run bounded by steps": (STEPS, BY_STEPS),
    "epoch end": (EPOCH_END, {}),
    "epoch end, run bounded by steps": (EPOCH_END, BY_STEPS),
    "after validation, epoch end": (VALIDATION, {}),
    "after validation, mid-epoch": (VALIDATION, {"val_check_interval": 2}),
    "after validation, run bounded by steps": (VALIDATION, {"val_check_interval": 2, **BY_STEPS}),
    "after validation, across epochs": (VALIDATION, {"val_check_interval": 4, "check_val_every_n_epoch": None}),
    "each step, validation mid-epoch": ({"every_n_train_steps": 1}, {"val_check_interval": 2}),
    "accumulated gradients": ({"every_n_train_steps": 1}, {"accumulate_grad_batches": 2}),
    "limited batches": ({"every_n_train_steps": 1}, {"limit_train_batches": 5}),
}


def _trained_batches(checkpoint: Path) -> int:
    loops = torch.load(checkpoint, weights_only=False)["loops"]["fit_loop"]
    return loops["epoch_loop.batch_progress"]["total"]["processed"]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_resumed_run_sees_the_remaining_batches(tmp_path: Path, kind: str, num_workers: int) -> None:
    when, options = KINDS[kind]
    callbacks = [script.keep_all(tmp_path, **when)]
    whole, _ = script.fit(tmp_path, num_workers=num_workers, callbacks=callbacks, **options)
    checkpoints = sorted(tmp_path.glob("*.ckpt"), key=_trained_batches)
    assert len(checkpoints) >= 3
    if num_workers:  # workers cost time; the first one is mid-epoch where there is such
        checkpoints = checkpoints[:: len(checkpoints) - 1]
    for checkpoint in checkpoints:
        rest, _ = script.fit(tmp_path, str(checkpoint), num_workers=num_workers, **options)
        assert rest == whole[_trained_batches(checkpoint) :], checkpoint.name


def test_epochs_are_full_and_differ(tmp_path: Path) -> None:
    whole, _ = script.fit(tmp_path)
    epochs = [[i for epoch, _, ids in whole if epoch == wanted for i in ids] for wanted in range(3)]
    assert all(sorted(ids) == list(range(script.EXAMPLES)) for ids in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_resume_in_a_new_process(tmp_path: Path) -> None:
    num_workers = 2
    whole, _ = script.fit(tmp_path, num_workers=num_workers, callbacks=[script.keep_all(tmp_path, **STEPS)])
    checkpoint = tmp_path / "epoch=1-step=10.ckpt"
    output = tmp_path / "rest.json"
    forks.run([script.__file__, checkpoint, output, f"num_workers={num_workers}"], cwd=tmp_path).check_returncode()
    assert json.loads(output.read_text()) == [list(step) for step in whole[10:]]


def test_persistent_workers(tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_workers": 2, "persistent": True}
    whole, _ = script.fit(tmp_path, callbacks=[script.keep_all(tmp_path, **STEPS)], **options)
    rest, _ = script.fit(tmp_path, str(tmp_path / "epoch=1-step=8.ckpt"), **options)
    assert rest == whole[8:]


class SaveInsideStep(L.Callback):
    """Writes a checkpoint when a batch has been fetched and not yet trained on, as after an exception."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 9:
            trainer.save_checkpoint(self.path)


def test_batch_that_was_fetched_but_not_trained_on_comes_again(tmp_path: Path) -> None:
    checkpoint = tmp_path / "inside.ckpt"
    whole, _ = script.fit(tmp_path, callbacks=[SaveInsideStep(checkpoint)])
    rest, _ = script.fit(tmp_path, str(checkpoint))
    assert rest == whole[9:]


def test_resume_of_a_resumed_run(tmp_path: Path) -> None:
    whole, _ = script.fit(tmp_path, callbacks=[script.keep_all(tmp_path / "a", **STEPS)])
    script.fit(
        tmp_path,
        str(tmp_path / "a" / "epoch=0-step=2.ckpt"),
        callbacks=[script.keep_all(tmp_path / "b", **STEPS)],
    )
    rest, _ = script.fit(tmp_path, str(tmp_path / "b" / "epoch=0-step=4.ckpt"))
    assert rest == whole[4:]


def test_changed_batch_size_is_refused_mid_epoch_and_allowed_at_its_end(tmp_path: Path) -> None:
    script.fit(tmp_path, callbacks=[script.keep_all(tmp_path / "steps", **STEPS)])
    with pytest.raises(RuntimeError, match="batch_size was 4, is 5"):
        script.fit(tmp_path, str(tmp_path / "steps" / "epoch=0-step=2.ckpt"), batch_size=5)
    script.fit(tmp_path, callbacks=[script.keep_all(tmp_path / "ends", **EPOCH_END)])
    rest, _ = script.fit(tmp_path, str(tmp_path / "ends" / "epoch=0-step=6.ckpt"), batch_size=5)
    assert [len(ids) for _, _, ids in rest] == 2 * [5, 5, 5, 5, 3]


def test_overfit_batches_keeps_working(tmp_path: Path) -> None:
    """Lightning then builds the loader anew, with a sequential sampler."""
    whole, _ = script.fit(tmp_path, overfit_batches=2, callbacks=[script.keep_all(tmp_path, every_n_train_steps=1)])
    assert [ids for _, _, ids in whole] == 3 * [[0, 1, 2, 3], [4, 5, 6, 7]]
    rest, _ = script.fit(tmp_path, str(tmp_path / "epoch=1-step=3.ckpt"), overfit_batches=2)
    assert rest == whole[3:]


def test_loader_leaves_the_global_random_state_alone(tmp_path: Path) -> None:
    module = script.Numbers(num_workers=2)
    module.trainer = L.Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
    before = torch.get_rng_state()
    assert len(list(module.train_dataloader())) == 6
    assert torch.equal(torch.get_rng_state(), before)
