"""The ending of the scripts with several processes, where the interpreter's own would abort."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# What is registered first is called last: for some seconds it keeps the lock for which gloo's thread then waits, and the
# interpreter goes without giving that thread another chance. Something holds the group, as FSDP1 does.
SCRIPT = """
import atexit
atexit.register(sum, range(150_000_000))
import builtins
import time
import torch
import torch.distributed as dist
from tests.leaving import leave

dist.init_process_group("gloo")
builtins.held = dist.group.WORLD
if dist.get_rank() == 1:
    time.sleep(1)  # rank 0 has begun to leave by then
tensor = torch.zeros(8)
work = dist.all_reduce(tensor, async_op=True)
if dist.get_rank() == 1:
    work.wait()  # fails where rank 0 has left without it
del tensor, work
print("rank", dist.get_rank(), "was here")
leave()
"""


@pytest.mark.distributed
def test_gloo_may_still_be_at_work() -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = ["--no-python", sys.executable, "-c", SCRIPT]  # left to itself torchrun would start Python without buffers
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""}
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, *launch, *script], cwd=root, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(done.stdout.splitlines()) == ["rank 0 was here", "rank 1 was here"]  # what was in the buffers too
