"""Kill a piece of work at chosen moments: it runs in a fork of this process, which costs no new interpreter.

A moment is a change of files: the n-th time that the work opens a file for writing, renames, removes or makes something below a
folder. So the kills fall where they can do harm, and a seed gives the same moments again. `PMSS_KILLS` sets how many a test
tries (a few by default).
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tqdm import tqdm

KILLS = int(os.environ.get("PMSS_KILLS", "5"))
_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "os.link", "os.symlink"}

LIMIT = pytest.mark.timeout(300 + 60 * KILLS)
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a fork of the process: POSIX only")


@dataclass(frozen=True)
class Moment:
    """When to kill: so many seconds after the change of this number (from 1)."""

    change: int
    delay: float = 0.0
    by: signal.Signals = signal.SIGKILL


@dataclass(frozen=True)
class Ending:
    """How the work ended.

    Attributes:
        status: 0 where it finished, 1 after an exception, ``-N`` where signal N killed it.
        changes: How many changes it made, also where it was killed.
        output: What it printed, and its traceback.
    """

    status: int
    changes: int
    output: str


def run(work: Callable[[], Any], folder: Path, log: Path, moment: Moment | None = None) -> Ending:
    """Run the work in a fork; changes below `folder` are the moments at which it can be killed.

    Args:
        work: Needs no result; what it prints goes to `log`.
        folder: Where its changes count.
        log: A file outside of `folder`.
        moment: When to kill it; None: let it finish.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reading)
            handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
            torch.set_num_threads(1)  # a fork has lost the threads of its parent's pool
            _give_own_lock(tqdm)
            counter = _Counter(folder, moment, writing)
            sys.addaudithook(counter)
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        changes = len(pipe.read())
    _, status = os.waitpid(child, 0)
    return Ending(os.waitstatus_to_exitcode(status), changes, log.read_text(errors="replace"))


def moments(changes: int, seed: int, count: int = KILLS) -> list[Moment]:
    """Different moments of a work that makes so many changes, some of them a little after a change."""
    generator = random.Random(seed)
    chosen = generator.sample(range(1, changes + 1), min(count, changes))
    return [Moment(change, generator.choice((0.0, 0.0, 0.002, 0.02))) for change in sorted(chosen)]


def files(folder: Path, *, but: tuple[str, ...] = ()) -> dict[str, bytes | None]:
    """Everything below a folder by relative name: the content of files, None for folders."""
    return {
        path.relative_to(folder).as_posix(): None if path.is_dir() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.name not in but
    }


def _give_own_lock(bar: type[tqdm]) -> None:
    """Progress bars share a lock with all forks: one that is killed while it has the lock would stop all later ones."""
    bar.set_lock(threading.RLock())
    for kind in bar.__subclasses__():
        _give_own_lock(kind)


class _Counter:
    """The audit hook of the child, which tells its parent of each change: a killed process tells no number at its end."""

    def __init__(self, folder: Path, moment: Moment | None, told: int) -> None:
        self.folder, self.moment, self.told, self.changes = f"{folder}{os.sep}", moment, told, 0
        if moment is not None and moment.delay:  # here, since only the main thread may
            signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), moment.by))

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if event != "open" and event not in _CHANGES:
            return
        if event == "open" and not (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        if not any(isinstance(part, str | bytes | os.PathLike) and self._is_inside(part) for part in args[:2]):
            return
        self.changes += 1
        os.write(self.told, b".")
        if self.moment is not None and self.changes == self.moment.change:
            if self.moment.delay:
                signal.setitimer(signal.ITIMER_REAL, self.moment.delay)
            else:
                os.kill(os.getpid(), self.moment.by)

    def _is_inside(self, path: Any) -> bool:
        return os.fsdecode(path).startswith(self.folder)
