"""Start the two-process scripts and read what their ranks wrote."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from lightning.fabric.plugins.environments.lightning import find_free_network_port

from tests.forks import Program, first_ended, run


def launch(module: str, tasks: list[dict[str, Any]], *, timeout: float = 240, fails: bool = False) -> str:
    """Run ``python -m <module> JSON`` on two processes and check every rank of every task; returns stderr of both.

    The ranks are forks (`tests.forks`) with the environment that Lightning gives to those it starts itself, which the tests
    of `tests.callbacks` let it do.

    Args:
        module: Its rank r writes ``<folder>/rank<r>.json`` per task, with the key ``error`` if the task failed there.
        tasks: Each has a ``folder``; one that must fail has ``raises``, a part of the message that every rank must give.
        timeout: In seconds.
        fails: The processes themselves must end badly; no task is checked then.
    """
    for task in tasks:
        for file in Path(task["folder"]).glob("rank?.json"):
            file.unlink()
    statuses, errors = start_and_wait(["-m", module, json.dumps(tasks)], timeout)
    if fails:
        assert any(statuses), errors[-4000:]
    else:
        assert statuses == [0, 0], errors[-4000:]
    for task in [] if fails else tasks:
        check(task, errors)
    return errors


def on_two_processes(arguments: list[str | Path], *, timeout: float = 240) -> None:
    """Run a program as both ranks, which must end well."""
    statuses, errors = start_and_wait(arguments, timeout)
    assert statuses == [0, 0], errors[-4000:]


def start_and_wait(arguments: Sequence[str | Path], timeout: float) -> tuple[list[int | None], str]:
    """The status of each rank (None: it had to be killed), and stderr of both.

    When one rank has failed, the other one gets half a minute to see it: a launcher would kill it.
    """
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_network_port()), "WORLD_SIZE": "2"}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"} | shared
    _unlock()
    until = time.monotonic() + timeout
    with contextlib.ExitStack() as stack:
        programs = []
        for rank in (0, 1):
            place = {"NODE_RANK": "0", "LOCAL_RANK": str(rank), "RANK": str(rank)}
            programs.append(stack.enter_context(Program(arguments, env=environment | place, rank=rank)))
        left = list(programs)
        while left and (ended := first_ended(left, until - time.monotonic())):
            left.remove(ended)
            if ended.returncode:
                until = min(until, time.monotonic() + 30)
        return [program.returncode for program in programs], "".join(program.errors() for program in programs)


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
        _compile()


def per_strategy(start: Callable[[str], Path]) -> Callable[[str], Path]:
    """A launch of each strategy that is asked for: once, and where the strategy can run."""
    started = functools.cache(start)

    def asked(name: str) -> Path:
        require(name)
        return started(name)

    return asked


def whole_and_resumed(folder: Path, task: dict[str, Any], step: int) -> list[dict[str, Any]]:
    """Tasks of a run in ``folder/whole``, and of one in ``folder/resumed`` that goes on from its checkpoint of a step."""
    checkpoint = str(folder / "whole" / "saved" / f"step={step}.ckpt")
    return [
        task | {"folder": str(folder / "whole")},
        task | {"folder": str(folder / "resumed"), "checkpoint": checkpoint},
    ]


@functools.cache
def _compile() -> None:
    """Compile DeepSpeed's operation, which takes half a minute, where no rank of a test has to wait for it."""
    code = "from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder; ShareMemCommBuilder().load(verbose=False)"
    _unlock()
    done = run(["-c", code], env=os.environ | {"DS_ACCELERATOR": "cpu"})
    assert done.returncode == 0, done.stderr[-4000:]


def _unlock() -> None:
    """Remove the files that torch waits for while it compiles or loads: a rank that was killed meanwhile has left them."""
    for lock in Path(os.environ["TORCH_EXTENSIONS_DIR"]).glob("*/lock"):
        lock.unlink()


def ranks(folder: Path, count: int = 2) -> list[dict[str, Any]]:
    """What the ranks wrote."""
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(count)]
