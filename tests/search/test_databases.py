"""Workers of several hosts on one study: the database keeps them apart, and says which of them are dead."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
from optuna.study import Study
from optuna.trial import FrozenTrial

from lightning_pmss.search.storage import open_storage, open_study, said_if_away
from lightning_pmss.search.trial import Assignment, Outcome
from lightning_pmss.search.workers import HOST, PID, SURPLUS, Worker
from tests.search.databases import SERVERS, DatabaseServer
from tests.search.fakes import Trainings, make
from tests.search.forked import at_once, check_shared, ended, fork, together

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="workers are forks of this process: POSIX only")


@pytest.fixture(params=list(SERVERS))
def database(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DatabaseServer]:
    driver, server = SERVERS[request.param]
    pytest.importorskip(driver)
    running = server(Path(tmp_path_factory.mktemp("db", numbered=True)))
    try:
        yield running
    finally:
        running.stop()


def test_a_database_that_breaks_off(tmp_path: Path, database: DatabaseServer) -> None:
    def training(assignment: Assignment) -> Outcome:
        found = Trainings()(assignment)
        database.stop()
        return found

    with pytest.raises(ConnectionError, match="the database broke off: .*the same command continues"), said_if_away():
        make(tmp_path, training, url=database.url, trials=2).search()
    database.start()
    run, said = Trainings(), list[str]()
    search = make(tmp_path, run, url=database.url, trials=2, said=said)
    worker_is_dead = patch.object(
        search.worker, "is_dead", lambda study, trial: trial.number == 0
    )  # it is this process
    with worker_is_dead:
        search.search()
    assert len(run.ran) == 1
    assert [line.state for line in search.lines()] == ["done", "done"]


def test_two_workers_on_one_database(tmp_path: Path, database: DatabaseServer) -> None:
    """Each with a lock file of its own, as on two hosts: the database alone keeps them apart."""

    def work(number: int) -> None:
        search = make(tmp_path, together(tmp_path), url=database.url, trials=7, finish=3)
        search._claims = type(search._claims)(tmp_path / f"claims-{number}")
        search.search()
        search.finish()

    children = [fork(lambda number=number: work(number)) for number in range(2)]
    assert [ended(child) for child in children] == [0, 0]
    search = make(tmp_path, Trainings(), url=database.url, trials=7, finish=3)
    search.finish()
    check_shared(search, 7, 3)
    for trial in search.study.trials:
        assert trial.user_attrs.get(SURPLUS) or trial.user_attrs[PID] in children


def test_workers_that_make_the_tables_of_a_database_at_the_same_moment(database: DatabaseServer) -> None:
    assert at_once(3, lambda: open_study(open_storage(database.url), "study", "min", {"a": 1})) == [0] * 3


def become_another_host() -> None:
    """Give this process a host name of its own."""
    if ctypes.CDLL(None, use_errno=True).unshare(0x04000000):  # CLONE_NEWUTS
        raise OSError(ctypes.get_errno(), "unshare")
    socket.sethostname("another-host")


def can_become_another_host() -> bool:
    def quietly() -> None:
        try:
            become_another_host()
        except (OSError, AttributeError):  # not root, or not Linux
            os._exit(1)

    return ended(fork(quietly)) == 0


def test_a_worker_killed_on_another_host(tmp_path: Path, database: DatabaseServer) -> None:
    if not can_become_another_host():
        pytest.skip("only root on Linux can give a process another host name")

    def killed(assignment: Assignment) -> Outcome:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    def work() -> None:
        become_another_host()
        make(tmp_path / "there", killed, url=database.url, trials=2).search()

    assert ended(fork(work)) == -signal.SIGKILL
    said, run = list[str](), Trainings()
    worker = Worker(tmp_path / "workers", beat=0.05, grace=0.4)
    search = make(tmp_path / "here", run, url=database.url, trials=2, said=said, worker=worker)
    (left,) = search.study.trials
    assert (left.user_attrs[HOST], left.state.name) == ("another-host", "RUNNING")
    asked = list[bool]()

    def is_dead(study: Study, trial: FrozenTrial) -> bool:
        asked.append(Worker.is_dead(worker, study, trial))
        return asked[-1]

    with patch.object(worker, "is_dead", is_dead):
        search.search()
    assert asked[0] is False  # a lock of another host says nothing: it watches the beats
    assert asked[-1] is True
    assert len(run.ran) == 2
    assert [line.state for line in search.lines()] == ["done", "done"]
    assert any("on another-host has died; the trial is run again" in line for line in said)
