"""What the benchmarks share beside `benchmarks.machine`: timers, spreads, peak memory, tables, JSON.

A result file is ``{"benchmark", "command", "machine", ...figures}``; a spread is ``{"min", "median", "max", "n"}``.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import machine


def spread(values: Iterable[float]) -> dict[str, float]:
    """Min, median, max and number of the values."""
    known = list(values)
    return {"min": min(known), "median": statistics.median(known), "max": max(known), "n": len(known)}


def times(
    function: Callable[[], object], repeats: int, *, warmup: int = 1, clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """Seconds of `repeats` calls after `warmup` calls; ``clock=time.process_time`` counts this process's CPU time only."""
    for _ in range(warmup):
        function()
    found = []
    for _ in range(repeats):
        start = clock()
        function()
        found.append(clock() - start)
    return found


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Like `times` for several rivals, one call of each in turn, so that a slow minute of the machine falls on all."""
    for function in functions.values():
        for _ in range(warmup):
            function()
    found: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            found[name] += times(function, 1, warmup=0, clock=clock)
    return found


def peak_memory() -> int:
    """Bytes of resident memory at their highest, since the start or the last `reset_peak_memory` (Linux)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(r"VmHWM:\s+(\d+)", status)
    if found is None:
        raise RuntimeError("the kernel does not report the peak of resident memory (VmHWM in /proc/self/status)")
    return 1024 * int(found[1])


def reset_peak_memory() -> int:
    """Forget the peak so far; returns the bytes resident now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return peak_memory()


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; floats with four significant digits."""
    lines = [list(head), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(text)


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_result(path: str | os.PathLike[str] | None, benchmark: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    """Add machine, versions and the command to the figures; written as JSON where a path is given."""
    arguments = [Path(word).name if os.path.isabs(word) else word for word in sys.argv[1:]]  # no folder of this machine
    result = {
        "benchmark": benchmark,
        "command": " ".join(["python -m", f"benchmarks.{benchmark}", *arguments]),
        "machine": machine(),
        **figures,
    }
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result
