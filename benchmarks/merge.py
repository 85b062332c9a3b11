"""The streaming merge beside a copy of the base: time, and peak memory, however large the base.

    python -m benchmarks.merge [--shards 4] [--matrices 7] [--width 4096] [--rank 256] [--columns selected|all]
        [--threads N] [--rounds 3] [--folder DIR] [--json FILE]

Writes a bfloat16 base of ``shards x matrices`` square matrices (the defaults: 940 MB in shards of 235 MB) and a random
adapter for all of them to a temporary folder (below DIR, where given). Copy and merge take turns; both end with their files
flushed to the disk (fsync), so that neither leaves its writing to the other. The merge computes U's product, rounds, and
measures the rounding errors, as `merge_files` always does. Then one merge in a fresh process: the growth of its peak resident
memory over what the imported libraries take; the mapped shard counts in full, although the kernel may drop its pages at any
time. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.measure import spread, table, write_result
from lightning_pmss.files import merge_files
from lightning_pmss.files.adapter_file import WEIGHTS_FILE, AdapterFile, AdapterModule, write_adapter
from lightning_pmss.layers.fingerprint import fingerprint
from lightning_pmss.methods.pmss.config import PMSSConfig
from lightning_pmss.methods.pmss.method import PMSSUpdate
from lightning_pmss.methods.pmss.one_sided import OneSidedUpdate
from lightning_pmss.store.shards import INDEX_FILE, shard_names

# The libraries' own peak comes first; a small product makes them allocate their buffers before it is read. The peak is
# the kernel's VmHWM and not getrusage's, which on Linux a process inherits from the one that started it.
_CHILD = """
import re, sys, torch
from pathlib import Path
from lightning_pmss.files import merge_files
torch.set_num_threads(1)
torch.randn(64, 64) @ torch.randn(64, 64)
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before = peak()
merge_files(*sys.argv[1:], progress=False)
print(peak() - before)
"""


def make_inputs(
    folder: Path, *, shards: int, matrices: int, width: int, rank: int, columns: str = "selected"
) -> tuple[Path, Path]:
    """Write a base and an adapter of all its layers; returns their folders."""
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    generator = torch.Generator().manual_seed(0)
    modules: dict[str, AdapterModule] = {}
    weight_map: dict[str, str] = {}
    for shard, file in enumerate(shard_names(shards)):
        weights = {}
        for matrix in range(matrices):
            name = f"model.layers.{shard}.linear{matrix}"
            weight = torch.randn(width, width, generator=generator).mul_(width**-0.5).to(torch.bfloat16)
            rows, cols = (torch.randperm(width, generator=generator)[:rank] for _ in range(2))
            u = torch.randn(width if columns == "all" else rank, rank, generator=generator) / rank
            update = OneSidedUpdate(u, rows) if columns == "all" else PMSSUpdate(u, rows, cols)
            modules[name] = AdapterModule((width, width), "linear", fingerprint(*update.read(weight)), update)
            weights[f"{name}.weight"] = weight
            weight_map[f"{name}.weight"] = file
        save_file(weights, base / file, {"format": "pt"})
    (base / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    write_adapter(AdapterFile(adapter, PMSSConfig(columns=columns, rank=rank), None, None, modules), adapter)
    return base, adapter


def peak_growth(base: Path, adapter: Path, output: Path) -> int:
    """Merge in a fresh process; bytes by which its peak resident memory grew."""
    arguments = [sys.executable, "-c", _CHILD, str(base), str(adapter), str(output)]
    return int(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout)


def copy(base: Path, output: Path) -> None:
    """A plain copy, on the disk when it returns."""
    shutil.copytree(base, output)
    for file in output.iterdir():
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())


def compare(base: Path, adapter: Path, folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds of copy and merge, in turn after one unmeasured round, and the ratio of the wall times."""
    ways = {"copy": lambda out: copy(base, out), "merge": lambda out: merge_files(base, adapter, out, progress=False)}
    wall: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, run in ways.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            run(folder / name)
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - start_cpu)
            shutil.rmtree(folder / name)
    ratios = [merge / plain for plain, merge in zip(wall["copy"][1:], wall["merge"][1:], strict=True)]
    return {
        **{name: spread(values[1:]) for name, values in wall.items()},
        **{f"{name}, CPU": spread(values[1:]) for name, values in cpu.items()},
        "merge / copy": spread(ratios),
    }


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("shards", 4), ("matrices", 7), ("width", 4096), ("rank", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--columns", choices=("selected", "all"), default="selected")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: as many as torch takes by itself")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the temporary files go")
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    sizes = {name: getattr(options, name) for name in ("shards", "matrices", "width", "rank", "columns")}
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        base, adapter = make_inputs(folder, **sizes)
        times = compare(base, adapter, folder, options.rounds)
        grown = peak_growth(base, adapter, folder / "merged")
        files = [file.stat().st_size for file in base.glob("*.safetensors")]
        adapter_size = (adapter / WEIGHTS_FILE).stat().st_size
    print(table(["", "min", "median", "max", "n"], [(name, *values.values()) for name, values in times.items()]))
    memory = {
        "base": sum(files), "shard": max(files), "matrix": 2 * options.width**2, "adapter": adapter_size, "peak growth": grown,
    }  # fmt: skip
    print(table(["", "MB"], [(name, value / 1e6) for name, value in memory.items()]))
    write_result(options.json, "merge", {**sizes, "seconds": times, "bytes": memory})


if __name__ == "__main__":
    main()
