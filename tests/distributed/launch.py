"""Start the two-process scripts and read what their ranks wrote."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def launch(module: str, tasks: list[dict[str, Any]], *, timeout: float = 240, fails: bool = False) -> str:
    """Run ``python -m <module> JSON`` on two processes and check every rank of every task; returns stderr.

    Args:
        module: Its rank r writes ``<folder>/rank<r>.json`` per task, with the key ``error`` if the task failed there.
        tasks: Each has a ``folder``; one that must fail has ``raises``, a part of the message that every rank must give.
        timeout: In seconds.
        fails: The processes themselves must end badly; no task is checked then.
    """
    for task in tasks:
        for file in Path(task["folder"]).glob("rank?.json"):
            file.unlink()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    with subprocess.Popen(
        [sys.executable, "-m", module, json.dumps(tasks)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            _, errors = process.communicate(timeout=timeout)
        finally:
            # The second rank is a grandchild, which would otherwise wait for the first one for ever.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert (process.returncode != 0) is fails, errors[-4000:]
    for task in [] if fails else tasks:
        check(task, errors)
    return errors


def check(task: dict[str, Any], errors: str = "") -> None:
    """Fail where a rank of this task wrote nothing, failed, or did not fail as ``raises`` says it must."""
    for rank, record in enumerate(ranks(Path(task["folder"]))):
        found, expected = record.get("error"), task.get("raises")
        where = f"rank {rank} of {task['folder']}"
        if expected is None:
            assert found is None, f"{where}: {found}\n{errors[-4000:]}"
        else:
            assert found is not None, f"{where} did not fail, and {expected!r} was expected"
            assert expected in found, f"{where}: {found}\n{errors[-4000:]}"


def require(strategy: str) -> None:
    """Skip the test where DeepSpeed cannot run."""
    if strategy.startswith("zero"):
        pytest.importorskip(
            "deepspeed", reason="needs DeepSpeed (Linux): pip install -c constraints.txt -e '.[deepspeed]'"
        )
        if shutil.which("c++") is None and shutil.which("g++") is None:
            pytest.skip("DeepSpeed on the CPU compiles an operation and needs a C++ compiler")


def ranks(folder: Path) -> list[dict[str, Any]]:
    """What the two ranks wrote."""
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]
