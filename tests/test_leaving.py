"""The ending of the scripts with several processes, where the interpreter's own would abort."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

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
del tensor, work
leave()
"""


@pytest.mark.distributed
def test_gloo_may_still_be_at_work(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *launch], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
