"""Commands run as processes with a group and a log of their own; they end with the one that started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_pmss.runs.process import run_process
from tests.forks import ROOT
from tests.processes import await_end, wait_for

PYTHON = (sys.executable, "-S", "-c")
WAITS = "import time\nopen('pid', 'w').write(str(__import__('os').getpid()))\nwhile True: time.sleep(0.02)\n"


def await_file(path: Path) -> str:
    wait_for(lambda: path.exists() and path.read_text())
    return path.read_text()


def test_status_and_last_lines(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("an earlier run's lines\n")
    code = (
        "import sys\nfor n in range(30): print('line', n)\nprint('bar 1\\rbar 2\\r\\n\\x1b[1mend\\x1b[0m')\nsys.exit(3)"
    )
    ended = run_process([*PYTHON, code], log, lines=4)
    assert ended.status == 3
    assert ended.last_lines == "line 28\nline 29\nbar 2\nend"
    assert ended.how == "exit status 3"
    assert log.read_text().startswith("an earlier run's lines\nline 0\n")
    assert run_process([*PYTHON, "pass"], log).last_lines == ""


def test_refusals_and_signals(tmp_path: Path) -> None:
    said = "python -m lightning_pmss fit: error: no such model.\nGive another."
    for status, refused in ((2, "no such model.\nGive another."), (1, None)):
        ended = run_process([*PYTHON, f"import sys; sys.stderr.write({said!r}); sys.exit({status})"], tmp_path / "log")
        assert ended.refused == refused
    killed = run_process([*PYTHON, "import os; os.kill(os.getpid(), 9)"], tmp_path / "log")
    assert killed.status == -signal.SIGKILL
    assert killed.how == "SIGKILL, as the kernel sends it when memory runs out"


def test_what_it_left_behind_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = f"import subprocess, sys\nprint(subprocess.Popen([sys.executable, '-S', '-c', {WAITS!r}]).pid)"
    await_end(int(run_process([*PYTHON, code], tmp_path / "log").last_lines))


@pytest.mark.parametrize("stubborn", [False, True])
def test_an_exception_meanwhile_stops_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stubborn: bool) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lightning_pmss.runs.process._GRACE", 0.3 if stubborn else 30)
    reaction = "None" if stubborn else "print('saved', flush=True) or sys.exit(143)"
    code = f"import signal, sys\nsignal.signal(15, lambda *_: {reaction})\n{WAITS}"

    def meanwhile() -> None:
        if Path("pid").exists() and Path("pid").read_text():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_process([*PYTHON, code], tmp_path / "log", meanwhile=meanwhile, every=0.02)
    assert (tmp_path / "log").read_text() == ("" if stubborn else "saved\n")
    await_end(int(Path("pid").read_text()))


def test_it_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    """The process gets SIGTERM, as if somebody had asked it to stop, so a training saves its checkpoint."""
    child = (
        "import signal, sys\nfrom lightning_pmss.runs.process import stop_with_parent\nassert stop_with_parent()\n"
        f"signal.signal(15, lambda *_: open('saved', 'w').write('yes') and sys.exit(143))\n{WAITS}"
    )
    parent = (
        "import sys\nfrom pathlib import Path\nfrom lightning_pmss.runs.process import run_process\n"
        f"run_process([sys.executable, '-c', {child!r}], Path('log'))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", parent], cwd=tmp_path, env=environment) as process:
        pid = int(await_file(tmp_path / "pid"))
        process.kill()
    await_file(tmp_path / "saved")
    await_end(pid)


def test_a_process_of_a_terminal_has_no_parent_to_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_pmss.runs.process import stop_with_parent

    monkeypatch.delenv("LIGHTNING_PMSS_STARTED_BY", raising=False)
    assert not stop_with_parent()
