"""Several workers on one study: none runs another's trial, the dead are found, and their trials are run again."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_pmss.search.storage import open_storage, open_study
from lightning_pmss.search.trial import Assignment, Outcome
from lightning_pmss.search.workers import BEAT, HOST, LOCK, MOST_ATTEMPTS, PID, Worker, counted
from tests.processes import wait_for
from tests.search.fakes import Trainings, make
from tests.search.forked import at_once, check_shared, ended, fork, together

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="workers are forks of this process: POSIX only")


def dies(folder: Path, after: int, **options: Any) -> list[Any]:
    """Let a worker run some trials and be killed in the next one."""
    run = Trainings()

    def training(assignment: Assignment) -> Outcome:
        if len(run.ran) == after:
            (folder / "killed").write_text(assignment.config)
            os.kill(os.getpid(), signal.SIGKILL)
        return run(assignment)

    def work() -> None:
        search = make(folder, training, **options)
        search.search()
        search.finish()

    assert ended(fork(work)) == -signal.SIGKILL
    return []


def test_the_trial_of_a_killed_worker_is_run_again(tmp_path: Path) -> None:
    dies(tmp_path, 2)
    run, said = Trainings(), list[str]()
    search = make(tmp_path, run, said=said)
    search.search()
    assert f"lr: {run.ran[0][0]['lr']}" in (tmp_path / "killed").read_text()
    assert len(run.ran) == 4
    assert [line.state for line in search.lines()] == ["done"] * 6
    assert any("has died; the trial is run again" in line for line in said)


def test_a_result_that_a_killed_worker_has_left_is_kept(tmp_path: Path) -> None:
    run = Trainings()

    def work() -> None:
        def training(assignment: Assignment) -> Outcome:
            run(assignment)
            os.kill(os.getpid(), signal.SIGKILL)
            raise AssertionError

        make(tmp_path, training).search()

    assert ended(fork(work)) == -signal.SIGKILL
    said = list[str]()
    search = make(tmp_path, run, said=said)
    search.search()
    assert len(run.ran) == 5
    assert [line.state for line in search.lines()] == ["done"] * 6
    assert any("its result is kept" in line for line in said)


def test_a_worker_killed_in_the_second_part(tmp_path: Path) -> None:
    dies(tmp_path, 7, finish=2)
    run = Trainings()
    search = make(tmp_path, run, finish=2)
    search.search()
    search.finish()
    assert len(run.ran) == 1
    assert run.ran[0][1] is not None
    assert [line.final_state for line in search.lines()].count("done") == 2


def test_a_trial_that_kills_every_worker_fails(tmp_path: Path) -> None:
    for _ in range(MOST_ATTEMPTS):
        dies(tmp_path, 0, trials=2)
    run = Trainings()
    search = make(tmp_path, run, trials=2)
    search.search()
    assert [line.state for line in search.lines()] == ["failed", "done"]


def test_a_live_worker_keeps_its_trial(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    trial = Trainings()

    def training(assignment: Assignment) -> Outcome:
        (tmp_path / "runs").touch()
        os.read(reading, 1)
        return trial(assignment)

    child = fork(lambda: make(tmp_path, training, trials=1).search())
    wait_for((tmp_path / "runs").exists)
    said, run = list[str](), Trainings()
    search = make(tmp_path, run, trials=1, said=said)
    (running,) = counted(search.study)
    assert (running.user_attrs[PID], search.worker.is_dead(search.study, running)) == (child, False)
    second = fork(lambda: make(tmp_path, run, trials=1).search())  # it waits for the first one
    os.write(writing, b".")
    assert (ended(child), ended(second)) == (0, 0)
    assert [line.state for line in search.lines()] == ["done"]
    assert not said


def test_two_workers_share_the_trials(tmp_path: Path) -> None:
    def work() -> None:
        search = make(tmp_path, together(tmp_path), trials=7, finish=3)
        search.search()
        search.finish()

    children = [fork(work) for _ in range(2)]
    assert [ended(child) for child in children] == [0, 0]
    search = make(tmp_path, Trainings(), trials=7, finish=3)
    search.finish()
    check_shared(search, 7, 3)


def test_of_another_host_the_beats_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("lightning_pmss.search.workers.time", SimpleNamespace(monotonic=lambda: now))
    search = make(tmp_path, Trainings(), worker=Worker(tmp_path / "workers", beat=0.01, grace=100))
    trial = search._claim(6)
    assert trial is not None
    trial.set_user_attr(HOST, "elsewhere")
    trial.set_user_attr(LOCK, "/nowhere")

    def dead() -> bool:
        (running,) = counted(search.study)
        return search.worker.is_dead(search.study, running)

    def beats() -> int:
        (running,) = counted(search.study)
        return int(running.user_attrs.get(BEAT, 0))

    with search.worker.works_on(trial):
        for _ in range(4):
            before = beats()
            wait_for(lambda before=before: beats() > before)
            now += 90
            assert not dead()
    dead()  # sees the last beat
    now += 99
    assert not dead()
    now += 2
    assert dead()


def test_a_worker_that_was_taken_for_dead_does_not_overwrite(tmp_path: Path) -> None:
    said = list[str]()

    def training(assignment: Assignment) -> Outcome:
        other.study.tell(0, 0.123)
        return Trainings()(assignment)

    other = make(tmp_path, Trainings())
    search = make(tmp_path, training, said=said, trials=1)
    search.search()
    assert search.study.trials[0].value == 0.123
    assert any("took this one for dead" in line for line in said)


def test_workers_that_make_the_database_at_the_same_moment(tmp_path: Path) -> None:
    for number in range(3):
        url = f"sqlite:///{tmp_path / f'{number}.db'}"
        assert at_once(3, lambda url=url: open_study(open_storage(url), "study", "min", {"a": 1})) == [0] * 3
