"""Run a command that must not outlive the process which started it: ``python -m lightning_pmss.search.guard COMMAND ...``.

The starter keeps a pipe to the guard's stdin, and writes nothing. The pipe closes when the starter ends, however it ends; the
guard then kills its process group: itself, the command, and whatever the command has started.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading


def _watch() -> None:
    sys.stdin.buffer.read()
    os.killpg(0, signal.SIGKILL)


def main(command: list[str]) -> int:
    """Run the command; return its exit code, 128 + N where signal N ended it."""
    if os.getpgid(0) != os.getpid():
        raise RuntimeError("The guard needs a process group of its own, since it kills the group.")
    # The command gets the signal, too; the guard reports how it ended.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    process = subprocess.Popen(  # noqa: S603
        command, stdin=subprocess.DEVNULL, preexec_fn=_default_signals
    )
    threading.Thread(target=_watch, daemon=True).start()
    code = process.wait()
    return 128 - code if code < 0 else code


def _default_signals() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(status)  # the thread still reads
