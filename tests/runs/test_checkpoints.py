"""The checkpoints from which a stopped run goes on."""

from __future__ import annotations

import os
from pathlib import Path

from lightning_pmss.runs.checkpoints import clear, newest, saver


def test_checkpoints_are_never_of_the_last_step(tmp_path: Path) -> None:
    """A run that resumes there would not validate, and so have no score."""
    for steps in range(1, 200):
        every = saver(tmp_path, steps)["init_args"]["every_n_train_steps"]
        assert steps % every
        assert every < steps or steps < 4


def test_the_newest_is_found_among_several_folders(tmp_path: Path) -> None:
    assert newest([tmp_path / "none"]) is None
    for age, name in enumerate(["a/last.ckpt", "b/last.ckpt", "b/last-interrupted.ckpt", "a/other.ckpt"]):
        path = tmp_path / name.replace("/", "/checkpoints/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (age, age))
    folders = [tmp_path / "a", tmp_path / "b"]
    assert newest(folders) == tmp_path / "b" / "checkpoints" / "last-interrupted.ckpt"
    clear(tmp_path / "b")
    assert newest(folders) == tmp_path / "a" / "checkpoints" / "last.ckpt"
