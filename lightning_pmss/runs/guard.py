"""Run a command that must not outlive the process which started it: ``python -m lightning_pmss.runs.guard COMMAND ...``.

`run_process` starts the guard, with a pipe that closes when the starting process ends, however it ends. The guard then kills
its process group: itself, the command, and whatever the command has started, such as the processes of a launcher. Unlike
`stop_with_parent` it needs nothing of the command, works before the command has imported anything, and leaves no checkpoint.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

from lightning_pmss.runs.process import STARTED_BY

GUARD = (sys.executable, "-m", "lightning_pmss.runs.guard")
"""What stands before a command that is guarded."""


def main(command: list[str]) -> int:
    """Run the command; return its exit status, 128 + N where signal N ended it."""
    if os.getpgid(0) != os.getpid():
        raise RuntimeError("the guard needs a process group of its own, since it kills the group.")
    pipe = int(os.environ.pop(STARTED_BY))
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)  # noqa: S603
    # The command has got these signals, too; the guard reports how it ended.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.read(pipe, 1):
            pass
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    status = process.wait()
    return 128 - status if status < 0 else status


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # the thread still reads
