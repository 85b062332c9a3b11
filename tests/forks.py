"""Start Python programs as forks of a server that has imported everything: imports take most of the time of a small program.

A program is what follows ``python`` on a command line: ``["-m", "lightning_pmss", "merge", ...]``, ``["-c", CODE, ...]`` or
``["script.py", ...]``. It gets a session, an environment, streams and a random state of its own, and ends as an interpreter
does: with the handlers of `atexit`, a status, and the traceback of what was not caught. There is a server per rank, since two
interpreters order sets of strings differently, and Lightning reads the rank while it is imported. The server waits in a
process without other threads, and computes nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Self

import numpy as np

ROOT = Path(__file__).parents[1]
NEEDED = (
    "lightning.pytorch.loggers",
    "lightning_pmss.cli.lightning",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.run",
    "transformers.models.llama.modeling_llama",
)
OPTIONAL = ("matplotlib.pyplot", "peft", "deepspeed")


class Program:
    """A program that runs; leaving the context kills it and whatever it has started.

    Args:
        arguments: What follows ``python`` on the command line.
        env: Its environment; by default that of this process.
        cwd: Its working folder.
        rank: Which server it is a fork of.
        stream: Make `stdout` a pipe to read from while it runs; otherwise `communicate` returns it.
    """

    def __init__(
        self,
        arguments: Sequence[str | os.PathLike[str]],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] = ROOT,
        rank: int = 0,
        stream: bool = False,
    ) -> None:
        self.returncode: int | None = None
        self._files = [tempfile.TemporaryFile("w+", errors="replace") for _ in range(2)]  # noqa: SIM115
        self.stdout: Any = None
        output = self._files[0].fileno()
        if stream:
            reading, output = os.pipe()
            self.stdout = os.fdopen(reading)
        self._status, status = os.pipe()
        request = {
            "arguments": [os.fspath(argument) for argument in arguments],
            "environment": dict(os.environ if env is None else env),
            "folder": os.fspath(cwd),
        }
        server = _server(rank)
        fds = [status, output, self._files[1].fileno()]
        socket.send_fds(server, [b"\n"], fds)
        server.sendall(json.dumps(request).encode() + b"\n")
        os.close(status)
        if stream:
            os.close(output)
        self.pid = int(self._line(200))  # the server may still be importing

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill_group()
        self.wait(60)
        os.close(self._status)
        for file in (*self._files, self.stdout):
            if file is not None:
                file.close()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill_group(self) -> None:
        """Kill it and what it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def wait(self, timeout: float) -> int:
        """Its status: ``-N`` where signal N ended it.

        Raises:
            subprocess.TimeoutExpired: After so many seconds.
        """
        if self.returncode is None:
            self.returncode = int(self._line(timeout))
        return self.returncode

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Wait for its end; what it wrote to stdout and stderr."""
        self.wait(timeout)
        rest = self.stdout.read() if self.stdout is not None else _content(self._files[0])
        return rest, self.errors()

    def errors(self) -> str:
        """What it has written to stderr."""
        return _content(self._files[1])

    def fileno(self) -> int:
        """Readable when it has ended."""
        return self._status

    def _line(self, timeout: float) -> str:
        if not select.select([self._status], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired("a fork", timeout)
        line = b""
        while not line.endswith(b"\n"):
            byte = os.read(self._status, 1)
            assert byte, f"the fork server is gone: {line!r}"
            line += byte
        return line.decode()


def first_ended(programs: Sequence[Program], timeout: float) -> Program | None:
    """Wait until one of them ends; None after so many seconds."""
    ended, _, _ = select.select(programs, [], [], max(timeout, 0))
    if ended:
        ended[0].wait(0)
    return ended[0] if ended else None


def run(
    arguments: Sequence[str | os.PathLike[str]], *, timeout: float = 280, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; the options are those of `Program`."""
    with Program(arguments, **options) as program:
        output, errors = program.communicate(timeout)
        assert program.returncode is not None
        return subprocess.CompletedProcess(list(arguments), program.returncode, output, errors)


def _content(file: Any) -> str:
    file.seek(0)
    content: str = file.read()
    return content


@functools.cache
def _server(rank: int) -> socket.socket:
    """The connection to the server of a rank, which ends with this process."""
    ours, theirs = socket.socketpair()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": _python_path()}
    if rank:
        environment["LOCAL_RANK"] = str(rank)
    subprocess.Popen(  # it ends when `ours` is closed
        [sys.executable, "-m", "tests.forks", str(theirs.fileno())],
        cwd=ROOT,
        env=environment,
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    theirs.close()
    return ours


def _python_path() -> str:
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


# -- the server ---------------------------------------------------------------------------------------------------------


def _preload() -> None:
    import lightning_pmss

    for name in lightning_pmss.__all__:  # imported when they are first asked for
        getattr(lightning_pmss, name)
    for name in NEEDED:
        importlib.import_module(name)
    for name in OPTIONAL:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(name)
    threads = Path("/proc/self/task")
    assert not threads.is_dir() or len(os.listdir(threads)) == 1, "a fork would lose the server's other threads"


def _serve(connection: socket.socket) -> dict[str, Any]:
    """Fork for each request; returns it, in the new process alone."""
    while True:
        byte, fds, _, _ = socket.recv_fds(connection, 1, 3)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:  # those of earlier requests that have ended
                pass
        if not byte:
            os._exit(0)
        line = b""
        while not line.endswith(b"\n"):
            line += connection.recv(65536)  # one request at a time: who asks waits for the process id
        if os.fork() == 0:
            connection.close()
            if _is_program(fds[0]):
                request: dict[str, Any] = json.loads(line)
                _place(request, fds)
                return request
        for fd in fds:
            os.close(fd)


def _is_program(status: int) -> bool:
    """Fork once more: the parent waits and reports, the child is the program."""
    program = os.fork()
    if program == 0:
        return True
    os.write(status, f"{program}\n".encode())
    _, ended = os.waitpid(program, 0)
    with contextlib.suppress(BrokenPipeError):
        os.write(status, f"{os.waitstatus_to_exitcode(ended)}\n".encode())
    os._exit(0)


def _place(request: dict[str, Any], fds: list[int]) -> None:
    """Give this process the streams, environment and folder that the program was asked for with."""
    os.setsid()
    for fd, number in zip(fds[1:], (1, 2), strict=True):
        os.dup2(fd, number)
    for fd in fds:
        os.close(fd)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    tempfile.tempdir = None  # read from the environment again
    np.random.seed()  # as in a new interpreter; `random` does so by itself


def _run(arguments: list[str]) -> None:
    """As ``python`` does."""
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path[0] = os.getcwd()
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        sys.path[0] = ""
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(arguments[1], "<string>", "exec"), main.__dict__)  # noqa: S102
    else:
        sys.argv = arguments
        sys.path[0] = str(Path(arguments[0]).parent)
        runpy.run_path(arguments[0], run_name="__main__")


def _end_like_python(run: Callable[[], None]) -> NoReturn:
    """Run it and end as the interpreter does, but for the two seconds in which it frees all modules."""
    status = 0
    try:
        run()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if not isinstance(error.code, int | None):
            print(error.code, file=sys.stderr)
    except BaseException as error:
        status = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
        sys.excepthook(type(error), error, error.__traceback__)
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status & 0xFF)


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as listening:
        _preload()
        gc.collect()
        gc.freeze()  # else each fork's first collection would copy all pages
        asked = _serve(listening)
    _end_like_python(functools.partial(_run, asked["arguments"]))
