"""Several workers on one study: none runs another's trial, the dead are found, and their trials are run again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from lightning_pmss.search.records import lines
from lightning_pmss.search.search import Search
from lightning_pmss.search.storage import open_storage, open_study, said_if_away
from lightning_pmss.search.trial import Assignment, Outcome
from lightning_pmss.search.workers import HOST, LOCK, MOST_ATTEMPTS, PID, SURPLUS, Worker, counted
from tests.search.fakes import Trainings, make

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="workers are forks of this process: POSIX only")


def fork(work: Callable[[], Any]) -> int:
    """Run it in a process of its own; returns its id."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(status)
    return child


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


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
    while not (tmp_path / "runs").exists():
        time.sleep(0.01)
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


def together(folder: Path) -> Callable[[Assignment], Outcome]:
    """A runner whose first training waits until another process has begun one, too."""
    meeting = folder / "meeting"
    meeting.mkdir(exist_ok=True)

    def training(assignment: Assignment) -> Outcome:
        with (assignment.folder / "ran").open("x"):  # a second run of it would raise
            (meeting / str(os.getpid())).touch()
            end = time.monotonic() + 60
            while len(list(meeting.iterdir())) < 2:
                assert time.monotonic() < end, "the other worker has begun no training"
                time.sleep(0.01)
        return Trainings()(assignment)

    return training


def check_shared(search: Search, trials: int, finish: int) -> None:
    assert search.finals is not None
    found = lines(search.study, search.finals, False)
    assert len(found) == trials
    assert {line.state for line in found} == {"done"}
    assert len({str(line.params) for line in found}) == trials
    assert [line.final is not None for line in found].count(True) == finish
    assert len([trial for trial in search.finals.trials if trial.state.name == "COMPLETE"]) == finish
    assert len({line.where for line in found}) == 2  # both did some
    ran = list((search.plan.output / "trials").rglob("ran"))
    assert len(ran) == trials + finish


def test_of_another_host_the_beats_tell(tmp_path: Path) -> None:
    search = make(tmp_path, Trainings(), worker=Worker(tmp_path / "workers", beat=0.05, grace=0.4))
    trial = search._claim(6)
    assert trial is not None
    trial.set_user_attr(HOST, "elsewhere")
    trial.set_user_attr(LOCK, "/nowhere")

    def dead() -> bool:
        (running,) = counted(search.study)
        return search.worker.is_dead(search.study, running)

    with search.worker.works_on(trial):
        end = time.monotonic() + 1.2
        while time.monotonic() < end:
            assert not dead()
            time.sleep(0.05)
    assert not dead()  # the last beat has just been seen
    time.sleep(0.5)
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


def at_once(count: int, work: Callable[[], Any]) -> list[int]:
    """Statuses of processes that begin at the same moment."""
    reading, writing = os.pipe()
    children = [fork(lambda: (os.read(reading, 1), work())) for _ in range(count)]
    os.write(writing, b"." * count)
    return [ended(child) for child in children]


def test_workers_that_make_the_database_at_the_same_moment(tmp_path: Path) -> None:
    for number in range(3):
        url = f"sqlite:///{tmp_path / f'{number}.db'}"
        assert at_once(3, lambda url=url: open_study(open_storage(url), "study", "min", {"a": 1})) == [0] * 3


# -- PostgreSQL ---------------------------------------------------------------------------------------------------------


class Postgres:
    """A PostgreSQL that listens on a socket in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        programs = sorted(Path("/usr/lib/postgresql").glob("*/bin")) or [Path("/usr/bin")]
        if not (programs[-1] / "initdb").exists():
            pytest.skip("needs a PostgreSQL: apt-get install postgresql")
        self.folder, self.url = folder, f"postgresql+psycopg2://tester@/postgres?host={folder}"
        prefix: list[str] = []
        if os.geteuid() == 0:  # it refuses to run as root
            if shutil.which("setpriv") is None:
                pytest.skip("PostgreSQL refuses to run as root, and there is no setpriv")
            shutil.chown(folder, "nobody")
            prefix = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"]
            for place in [folder, *folder.parents]:  # the other user must reach it
                if place.owner() == "root" and place.stat().st_mode & 0o001 == 0:
                    place.chmod(place.stat().st_mode | 0o011)
        data = str(folder / "data")
        make_it = [str(programs[-1] / "initdb"), "-D", data, "-A", "trust", "-U", "tester", "--no-sync", "-E", "UTF8"]
        made = subprocess.run([*prefix, *make_it], capture_output=True, text=True, cwd="/")
        if made.returncode:
            pytest.skip(f"initdb fails here: {made.stderr.strip()[-200:]}")
        serve = [str(programs[-1] / "postgres"), "-D", data, "-k", str(folder), "-c", "listen_addresses=", "-F"]
        self._command = [*prefix, *serve]
        self.start()

    def start(self) -> None:
        with (self.folder / "log").open("w") as log:
            self._server = subprocess.Popen(self._command, stdout=log, stderr=log, cwd="/")
        end = time.monotonic() + 60
        while "ready to accept" not in (said := (self.folder / "log").read_text()):
            assert self._server.poll() is None, said
            assert time.monotonic() < end
            time.sleep(0.05)

    def stop(self) -> None:
        if self._server.poll() is None:
            self._server.send_signal(signal.SIGINT)
            self._server.wait(30)


@pytest.fixture
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    pytest.importorskip("psycopg2", reason="needs psycopg2-binary")
    server = Postgres(Path(tmp_path_factory.mktemp("pg", numbered=True)))
    try:
        yield server
    finally:
        server.stop()


def test_a_database_that_breaks_off(tmp_path: Path, postgres: Postgres) -> None:
    def training(assignment: Assignment) -> Outcome:
        found = Trainings()(assignment)
        postgres.stop()
        return found

    with pytest.raises(ConnectionError, match="the database broke off: .*the same command continues"), said_if_away():
        make(tmp_path, training, url=postgres.url, trials=2).search()
    postgres.start()
    run, said = Trainings(), list[str]()
    search = make(tmp_path, run, url=postgres.url, trials=2, said=said)
    worker_is_dead = patch.object(
        search.worker, "is_dead", lambda study, trial: trial.number == 0
    )  # it is this process
    with worker_is_dead:
        search.search()
    assert len(run.ran) == 1
    assert [line.state for line in search.lines()] == ["done", "done"]


def test_two_workers_on_one_postgresql(tmp_path: Path, postgres: Postgres) -> None:
    """Each with a lock file of its own, as on two hosts: the database alone keeps them apart."""

    def work(number: int) -> None:
        search = make(tmp_path, together(tmp_path), url=postgres.url, trials=7, finish=3)
        search._claims = type(search._claims)(tmp_path / f"claims-{number}")
        search.search()
        search.finish()

    children = [fork(lambda number=number: work(number)) for number in range(2)]
    assert [ended(child) for child in children] == [0, 0]
    search = make(tmp_path, Trainings(), url=postgres.url, trials=7, finish=3)
    search.finish()
    check_shared(search, 7, 3)
    for trial in search.study.trials:
        assert trial.user_attrs.get(SURPLUS) or trial.user_attrs[PID] in children


def test_workers_that_make_the_tables_of_postgresql_at_the_same_moment(postgres: Postgres) -> None:
    assert at_once(3, lambda: open_study(open_storage(postgres.url), "study", "min", {"a": 1})) == [0] * 3
