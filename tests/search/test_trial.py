"""A trial is a process that ends with the process which started it, and whose end is read from its folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_pmss.search.result import RESULT, Result, write_result
from lightning_pmss.search.trial import CONFIG, OUTPUT, Assignment, ProcessRunner, outcome
from tests.processes import alive, await_end, wait_for

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="process groups of POSIX")


def runner(folder: Path, code: str) -> ProcessRunner:
    """A runner whose `fit` is a few lines of Python; ``folder`` is the trial's."""
    script = folder / "fit.py"
    script.write_text(f"import os, sys, time\nfolder = {str(folder)!r}\n{code}\n")
    return ProcessRunner([sys.executable, str(script)])


def test_the_result_is_read(tmp_path: Path) -> None:
    left = Result(state="stopped", step=2, steps=10, score=0.5, untrained=0.9, checkpoint="here")
    write_result(tmp_path, left)
    done = runner(tmp_path, "print(sys.argv[1:]); print('to stderr', file=sys.stderr)")
    found = done(Assignment(tmp_path, "a: 1", "before.ckpt"))
    assert (found.state, found.score, found.untrained, found.checkpoint) == ("stopped", 0.5, 0.9, "here")
    assert (tmp_path / CONFIG).read_text() == "a: 1"
    text = (tmp_path / OUTPUT).read_text()
    assert "'fit', '--config'" in text
    assert "'--ckpt_path', 'before.ckpt'" in text
    assert "to stderr" in text


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (
            "print('\\n'.join(map(str, range(99)))); raise ValueError('the rank is too large')",
            "ValueError: the rank is too",
        ),
        ("print('RuntimeError: CUDA out of memory'); print('bye'); sys.exit(1)", "RuntimeError: CUDA out of memory"),
        ("os.kill(os.getpid(), 9)", "ended by signal SIGKILL, as the kernel"),
        ("os.kill(os.getpid(), 11)", "ended by signal SIGSEGV"),
        ("sys.exit(3)", "exit status 3, and no output"),
        ("print('well')", "ended without a result"),
    ],
)
def test_a_crash_has_a_reason_and_its_last_lines(tmp_path: Path, code: str, reason: str) -> None:
    found = runner(tmp_path, code)(Assignment(tmp_path, ""))
    assert found.state == "failed"
    assert found.message.startswith(reason)
    assert len(found.lines) <= 12
    if "range(99)" in code:
        assert "98" in found.lines


def test_a_divergence_counts_although_the_process_failed(tmp_path: Path) -> None:
    write_result(tmp_path, Result(state="diverged", step=2, steps=10, message="NaN"))
    assert outcome(tmp_path, 1, "").state == "diverged"
    write_result(tmp_path, Result(state="stopped", step=2, steps=10, score=1.0))
    assert outcome(tmp_path, 1, "").state == "failed"  # it crashed while it wrote its other results
    (tmp_path / RESULT).write_text('{"state": "stopped"')
    assert outcome(tmp_path, 0, "").state == "failed"
    assert "is not readable JSON" in outcome(tmp_path, 0, "").message


def test_what_it_has_started_ends_with_it(tmp_path: Path) -> None:
    child = (
        "import subprocess\nchild = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "open(folder + '/child', 'w').write(str(child.pid))"
    )
    runner(tmp_path, child)(Assignment(tmp_path, ""))
    pid = int((tmp_path / "child").read_text())
    await_end(pid)


def test_an_interrupt_ends_the_trial_before_it_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import signal\nsignal.signal(signal.SIGTERM, lambda *_: (print('saves'), sys.exit(1)))\n"
        "open(folder + '/pid', 'w').write(str(os.getpid()))\ntime.sleep(600)"
    )
    there = tmp_path / "pid"
    usual, calls = subprocess.Popen.wait, []

    def wait(self: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        if not calls:
            calls.append(1)
            wait_for(lambda: there.exists() and there.read_text())
            raise KeyboardInterrupt
        return usual(self, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", wait)
    with pytest.raises(KeyboardInterrupt):
        runner(tmp_path, code)(Assignment(tmp_path, ""))
    assert not alive(int(there.read_text()))
    assert "saves" in (tmp_path / OUTPUT).read_text()  # SIGTERM comes first


def test_it_dies_with_a_worker_that_is_killed(tmp_path: Path) -> None:
    """By SIGKILL, of which no handler knows; through a launcher with children of its own."""
    code = (
        "import subprocess\nchild = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "open(folder + '/pids', 'w').write(f'{os.getpid()} {child.pid} ')\ntime.sleep(600)"
    )
    trial = runner(tmp_path, code)
    worker = os.fork()
    if worker == 0:
        try:
            trial(Assignment(tmp_path, ""))
        finally:
            os._exit(1)
    pids = tmp_path / "pids"
    wait_for(lambda: pids.exists() and pids.read_text().endswith(" "))
    assert all(alive(int(pid)) for pid in pids.read_text().split())
    os.kill(worker, signal.SIGKILL)
    os.waitpid(worker, 0)
    for pid in pids.read_text().split():
        await_end(int(pid))
