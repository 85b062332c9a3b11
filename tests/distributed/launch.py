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


def launch(module: str, argument: Any, *, timeout: float = 240, fails: bool = False) -> str:
    """Run ``python -m <module> JSON`` on two processes; returns stderr. ``fails``: it must not end well."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    with subprocess.Popen(
        [sys.executable, "-m", module, json.dumps(argument)],
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
    return errors


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
