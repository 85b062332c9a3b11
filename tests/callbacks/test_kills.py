"""A fit is killed at random moments, resumed from the last checkpoint there is, and ends as if nothing had happened.

``PMSS_KILLS=25 pytest tests/callbacks/test_kills.py`` is the long version.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_pmss import PMSSCallback
from tests.callbacks import toys
from tests.killing import KILLS, LIMIT, Ending, Moment, files, forks, run

pytestmark = LIMIT

SIGNALS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)


def fit(folder: Path, merge: str, options: dict[str, Any]) -> None:
    """One start of the run: from the newest checkpoint in its folder, if there is one."""
    torch.manual_seed(1)
    callback = PMSSCallback(rank=6, dropout=0.3, output_dir=folder / "out", merge_on_save=merge)
    saver = ModelCheckpoint(folder / "saved", "{step}", every_n_train_steps=4, save_last=True)
    found = sorted((folder / "saved").glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    trainer = toys.trainer(folder, callback, saver, **options)
    trainer.fit(toys.Toy(), toys.Numbers(), ckpt_path=str(found[-1]) if found else None)


def start(folder: Path, work: Callable[[], None], moment: Moment | None = None) -> Ending:
    ending = run(work, folder, folder.parent / "log", moment)
    last = folder / "saved" / "last.ckpt"
    if last.exists():
        torch.load(last)  # whole at every moment
    return ending


@forks
@pytest.mark.parametrize(
    ("merge", "options"),
    [("end", {}), ("checkpoint", {}), ("end", {"val_check_interval": 2}), ("end", {"max_steps": 18})],
)
def test_killed_and_resumed_it_ends_as_if_nothing_had_happened(
    tmp_path: Path, merge: str, options: dict[str, Any]
) -> None:
    whole = tmp_path / "whole"
    ending = start(whole, partial(fit, whole, merge, options))
    assert ending.status == 0, ending.output
    expected = files(whole / "out")
    assert {"adapter/adapter_model.safetensors", "merged/model.safetensors"} <= set(expected)
    generator = random.Random(f"{merge} {options}")
    left = KILLS
    while left > 0:
        folder, story = tmp_path / f"killed{left}", []
        for _ in range(min(left, generator.randint(1, 3))):
            by = generator.choice(SIGNALS)
            moment = Moment(generator.randint(1, ending.changes), generator.choice((0.0, 0.0, 0.005, 0.05)), by)
            killed = start(folder, partial(fit, folder, merge, options), moment)
            story.append((moment, killed.status))
            if killed.status == -signal.SIGTERM:  # Lightning puts the default handler back at the end of fit
                assert files(folder / "out") == expected, story
                assert list(folder.rglob(".*")) == [], story
                assert len(story) > 1 or killed.changes == ending.changes, story  # a resumed fit makes fewer changes
            else:
                assert killed.status in ((0, -9) if by is signal.SIGKILL else (0, 1)), (story, killed.output)
            left -= 1
        again = start(folder, partial(fit, folder, merge, options))
        assert again.status == 0, (story, again.output)
        found = files(folder / "out")
        assert sorted(found) == sorted(expected), story
        assert [name for name in found if found[name] != expected[name]] == [], story
        assert list(folder.rglob(".*")) == [], story
        assert not list(folder.rglob("*interrupted*")), story
        if merge == "checkpoint":
            for checkpoint in (folder / "saved").glob("*.ckpt"):
                assert files(checkpoint.with_name(f"{checkpoint.stem}-merged")), story
