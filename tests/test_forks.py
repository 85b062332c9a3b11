"""Programs that are forks end like programs that a new interpreter runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import forks
from tests.processes import await_end

ENDINGS = {
    "well": "import atexit; atexit.register(print, 'last words'); print('done')",
    "with a number": "import sys; sys.exit(7)",
    "with a message": "import sys; sys.exit('no')",
    "with an error": "print('so far', end=''); raise KeyError('x')",
    "by Ctrl-C": "raise KeyboardInterrupt",
    "by a signal": "import os; os.kill(os.getpid(), 15)",
    "with a thread at work": (
        "import threading, time; threading.Thread(target=lambda: (time.sleep(0.1), print('late'))).start()"
    ),
}


@pytest.mark.parametrize("code", ENDINGS.values(), ids=ENDINGS)
def test_ends_as_under_a_new_interpreter(code: str) -> None:
    expected = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    found = forks.run(["-c", code])
    assert (found.returncode, found.stdout) == (expected.returncode, expected.stdout)
    assert found.stderr.splitlines()[-1:] == expected.stderr.splitlines()[-1:]


def test_modules_scripts_folder_and_environment(tmp_path: Path) -> None:
    code = "import os, sys\nprint(__name__, sys.argv[1:], os.getcwd(), os.environ['PMSS_X'], 'HOME' in os.environ)\n"
    (tmp_path / "program.py").write_text(code)
    expected = f"__main__ ['a b'] {tmp_path} y False\n"
    for start in (["-m", "program"], ["-c", code], [tmp_path / "program.py"]):
        done = forks.run([*start, "a b"], cwd=tmp_path, env={"PMSS_X": "y"})
        assert done.stdout == expected, done.stderr
    assert "PMSS_X" not in os.environ


def test_ranks_order_sets_differently_and_know_their_rank_at_import() -> None:
    code = "from lightning.pytorch.utilities import rank_zero_only as r; print(r.rank, hash('a'))"
    ranks = [forks.run(["-c", code], rank=rank).stdout.split() for rank in (0, 1)]
    assert [rank[0] for rank in ranks] == ["0", "1"]
    assert ranks[0][1] != ranks[1][1]


def test_what_it_started_is_killed_with_it() -> None:
    code = "import os, time\nif child := os.fork(): print(os.getpid(), child, flush=True)\ntime.sleep(600)"
    with forks.Program(["-c", code], stream=True) as program:
        own, child = map(int, program.stdout.readline().split())
        assert own == program.pid
        with pytest.raises(subprocess.TimeoutExpired):
            program.wait(0.01)
        os.kill(child, 0)
    assert program.returncode == -signal.SIGKILL
    await_end(child)
