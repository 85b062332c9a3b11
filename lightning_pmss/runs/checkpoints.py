"""The checkpoints from which a stopped run goes on."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_pmss.runs.configuration import made

_FOLDER = "checkpoints"
_SAVES = 10  # in a run, of which the last is kept
_NAMES = ("last.ckpt", "last-interrupted.ckpt")  # the second one is saved when the run is asked to stop


def saver(folder: Path, steps: int) -> dict[str, Any]:
    """Return the callback of a run's configuration that saves about ten checkpoints, none of the last step.

    A run that resumed the last step's would not validate, and so have no score.

    Args:
        folder: The run's folder.
        steps: Optimizer steps of the whole run.
    """
    every = max(1, steps // _SAVES)
    while steps % every == 0:
        every += 1
    return made(
        "lightning.pytorch.callbacks.ModelCheckpoint",
        dirpath=str(folder.absolute() / _FOLDER),
        save_last=True,
        save_top_k=0,
        every_n_train_steps=every,
    )


def newest(folders: Sequence[Path], steps: int | None) -> Path | None:
    """Return the checkpoint saved last by the runs in these folders, of those with something left to train.

    Args:
        folders: The runs' folders.
        steps: Optimizer steps of the whole run; None: not known, so that every checkpoint is taken.

    Returns:
        Its path; None if there is none.
    """
    found = [path for folder in folders for name in _NAMES if (path := folder / _FOLDER / name).exists()]
    found.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    return next((path for path in found if not _at_the_end(path, steps)), None)


def _at_the_end(path: Path, steps: int | None) -> bool:
    """Whether a checkpoint has all steps, as one saved in the last validation: resumed, it validates nothing."""
    if steps is None:
        return False
    step = step_at(path)
    return step is not None and step >= steps


def step_at(path: Path) -> int | None:
    """Return the optimizer step of a checkpoint; None if it is damaged, as the run that resumes it says."""
    from lightning_pmss.checkpoints.reading import step_of  # torch: a command that only shows results does without

    try:
        return step_of(path)
    except ValueError:
        return None


def clear(folder: Path) -> None:
    """Remove the checkpoints of a finished run; its adapter stays."""
    shutil.rmtree(folder / _FOLDER, ignore_errors=True)
