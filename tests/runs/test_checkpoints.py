"""The checkpoints from which a stopped run goes on."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from lightning_pmss.checkpoints.reading import step_of
from lightning_pmss.runs.checkpoints import clear, newest, saver


def test_checkpoints_are_never_of_the_last_step(tmp_path: Path) -> None:
    """A run that resumes there would not validate, and so have no score."""
    for steps in range(1, 200):
        every = saver(tmp_path, steps)["init_args"]["every_n_train_steps"]
        assert steps % every
        assert every < steps or steps < 4


def test_the_newest_is_found_among_several_folders(tmp_path: Path) -> None:
    assert newest([tmp_path / "none"], 5) is None
    for age, name in enumerate(["a/last.ckpt", "b/last.ckpt", "b/last-interrupted.ckpt", "a/other.ckpt"]):
        path = tmp_path / name.replace("/", "/checkpoints/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (age, age))
    folders = [tmp_path / "a", tmp_path / "b"]
    assert newest(folders, 5) == tmp_path / "b" / "checkpoints" / "last-interrupted.ckpt"
    clear(tmp_path / "b")
    assert newest(folders, 5) == tmp_path / "a" / "checkpoints" / "last.ckpt"


def test_a_checkpoint_with_all_steps_is_passed_over(tmp_path: Path) -> None:
    """It was saved in the last validation, which a run that resumes there would not repeat."""
    saved = tmp_path / "checkpoints"
    saved.mkdir()
    for age, (name, step) in enumerate([("last.ckpt", 10), ("last-interrupted.ckpt", 12)]):
        torch.save({"global_step": step}, saved / name)
        os.utime(saved / name, (age, age))
    assert newest([tmp_path], 12) == saved / "last.ckpt"
    assert newest([tmp_path], 10) is None
    assert newest([tmp_path], 13) == newest([tmp_path], None) == saved / "last-interrupted.ckpt"
    (saved / "last-interrupted.ckpt").write_bytes(b"damaged")  # the run that resumes it says so
    assert newest([tmp_path], 12) == saved / "last-interrupted.ckpt"


def test_the_step_of_a_folder(tmp_path: Path) -> None:
    for name, part in (("fsdp", "meta.pt"), ("zero", "checkpoint/mp_rank_00_model_states.pt")):
        file = tmp_path / name / part
        file.parent.mkdir(parents=True)
        torch.save({"global_step": 7}, file)
        assert step_of(tmp_path / name) == 7
