"""What a kill leaves behind must not reach the forks after it."""

from __future__ import annotations

import signal
from pathlib import Path

from tqdm.auto import tqdm

from tests import killing


@killing.forks
def test_a_fork_that_is_killed_inside_the_lock_of_progress_bars_stops_no_other(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    list(tqdm(range(2)))  # makes the lock that forks share

    def writes() -> None:
        with tqdm.get_lock():
            (tmp_path / "work" / "x").write_text("x")

    assert killing.run(writes, tmp_path / "work", tmp_path / "log", killing.Moment(1)).status == -signal.SIGKILL
    assert killing.run(lambda: list(tqdm(range(2))), tmp_path / "work", tmp_path / "log").status == 0
