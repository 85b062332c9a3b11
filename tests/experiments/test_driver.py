"""The driver: what is finished is not run again, what failed is, the budget is kept."""

from __future__ import annotations

import json
import multiprocessing
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments import driver
from experiments.driver import drive, read_records, spent_minutes
from experiments.run import Places
from experiments.study import Study, identity, read_study
from tests import forks

REPOSITORY = Path(__file__).resolve().parents[2]
TASK: dict[str, Any] = {"task": {"name": "pairs", "size": 4, "batch_size": 2}}


def _study(tmp_path: Path, model: str, **changes: Any) -> Study:
    asked = {
        "asks": "?",
        "budget_minutes": 5,
        "common": {"model": model, "steps": 1} | TASK,
        "sweep": {},
        "extend": 0,
        "arms": [{"name": "pmss", "rank": 4, "lr": [1e-3, 1e-2]}],
    }
    path = tmp_path / "asked.yaml"
    path.write_text(yaml.safe_dump(asked | changes))
    return read_study(path)


def _is_worker(process: str) -> bool:
    command = Path(f"/proc/{process}/cmdline")  # that of one which has ended and waits for its parent is empty
    return command.exists() and b"spawn_main" in command.read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_a_driver_that_is_ended_leaves_no_worker_and_no_half_record(tmp_path: Path, tiny_llama: str) -> None:
    study = tmp_path / "asked.yaml"
    _study(tmp_path, Path(tiny_llama).name, common={"steps": 100_000, "model": Path(tiny_llama).name} | TASK)
    words = ["--models", str(Path(tiny_llama).parent), "--data", str(tmp_path), "--records", str(tmp_path / "records")]
    command = ["-m", "experiments", "run", study, *words, "--workers", "1", "--cache", tmp_path / "cache"]
    with forks.Program(command) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        deadline = time.monotonic() + 120
        while not (tmp_path / "cache").exists() and time.monotonic() < deadline:  # the worker has begun
            time.sleep(0.1)
        workers = [child for child in children.read_text().split() if _is_worker(child)]
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143
        assert workers
        deadline = time.monotonic() + 10
        while any(map(_is_worker, workers)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not any(map(_is_worker, workers))
    assert not list((tmp_path / "records").rglob("*"))


@pytest.mark.slow
def test_runs_in_processes_and_resumes(tmp_path: Path, tiny_llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Three interpreters would import everything; the test above has a worker that is spawned.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["experiments.run"])
    monkeypatch.setattr(driver, "get_context", lambda _: context)
    folder = tmp_path / "records"
    places = Places((str(Path(tiny_llama).parent),), str(tmp_path), str(tmp_path / "cache"))
    study = _study(tmp_path, Path(tiny_llama).name)
    assert drive([study], places, workers=2, folder=folder) == 0
    files = sorted(folder.rglob("*.json"))
    assert len(files) == 2
    assert not list(folder.rglob("*.writing"))
    times = [file.stat().st_mtime_ns for file in files]
    files[1].unlink()  # as if the driver had been stopped before it
    assert drive([study], places, workers=1, folder=folder) == 0
    assert files[0].stat().st_mtime_ns == times[0]
    assert files[1].is_file()
    assert str(tmp_path) not in files[0].read_text()


class _Pool:
    """Runs at once, in this process."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def shutdown(self, **_: Any) -> None: ...

    def submit(self, function: Any, *arguments: Any) -> Any:
        from concurrent.futures import Future

        future: Any = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


def _record(spec: Any) -> dict[str, Any]:
    return {"spec": spec, "scores": {"val/loss": 1.0}, "status": "finished", "seconds": 90.0}


def test_failures_are_told_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = [True]

    def work(spec: Any, places: Any) -> Any:
        if spec["lr"] == 1e-2 and broken[0]:
            raise RuntimeError("no memory")
        return _record(spec)

    monkeypatch.setattr(driver, "ProcessPoolExecutor", _Pool)
    monkeypatch.setattr(driver, "run", work)
    study = _study(tmp_path, "tiny")
    places = Places((), "", "")
    assert drive([study], places, workers=1, folder=tmp_path / "records") == 1
    assert "no memory" in capsys.readouterr().out
    assert len(read_records(tmp_path / "records")) == 1
    broken[0] = False
    assert drive([study], places, workers=1, folder=tmp_path / "records") == 0
    records = read_records(tmp_path / "records")
    assert len(records) == 2
    assert spent_minutes(study, records) == 3.0


def test_a_budget_that_is_spent_begins_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "ProcessPoolExecutor", _Pool)
    monkeypatch.setattr(driver, "run", lambda spec, places: _record(spec))
    study = _study(tmp_path, "tiny", budget_minutes=1)
    drive([study], Places((), "", ""), workers=1, folder=tmp_path / "records")
    (only,) = read_records(tmp_path / "records").values()
    assert only["spec"]["lr"] == 1e-3


def test_a_record_is_named_by_its_specification(tmp_path: Path) -> None:
    study = _study(tmp_path, "tiny")
    spec = study.next_runs({})[0]
    path = driver.write_record(_record(spec), tmp_path)
    assert path.stem == identity(spec)
    assert json.loads(path.read_text())["spec"] == spec
