"""Memory of this machine, cores, and room on the disk."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path
from typing import Any

_MEMORY = Path("/proc/meminfo")
_LIMIT, _USED = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))


def machine() -> dict[str, Any]:
    """Return system, cores, bytes of memory (None where the system does not say) and of the working folder's disk."""
    total, free = _memory()
    disk = shutil.disk_usage(Path.cwd())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "system": platform.platform(),
        "cores": cores,
        "memory": {"total": total, "free": free},
        "disk": {"folder": str(Path.cwd()), "total": disk.total, "free": disk.free},
        "compiler": next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None),
    }


def _memory() -> tuple[int | None, int | None]:
    """Total and free memory in bytes, within the limit of a container."""
    try:
        rows = dict(line.split(":", 1) for line in _MEMORY.read_text().splitlines())
        total, free = (int(rows[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError):
        return None, None
    try:
        limit, used = int(_LIMIT.read_text()), int(_USED.read_text())
    except (OSError, ValueError):  # no container, or "max"
        return total, free
    return min(total, limit), max(0, min(free, limit - used))
