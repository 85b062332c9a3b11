"""Peak memory of the streaming merge on a synthetic base: one shard plus one matrix, however large the base.

    python benchmarks/merge_memory.py [--shards 5] [--matrices 8] [--width 2048] [--rank 256]

Writes a bfloat16 base of ``shards x matrices`` square matrices (the defaults: 336 MB in shards of 67 MB) and a random
adapter for all of them to a temporary folder, merges in a fresh process, and prints the growth of its peak resident
memory over what the imported libraries take. The mapped shard counts in full, although the kernel may drop its pages at
any time. Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from lightning_pmss.config import PMSSConfig
from lightning_pmss.files.adapter_file import CONFIG_FILE, FORMAT_VERSION, WEIGHTS_FILE
from lightning_pmss.files.shards import INDEX_FILE, shard_names
from lightning_pmss.fingerprint import fingerprint

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


def make_inputs(folder: Path, *, shards: int, matrices: int, width: int, rank: int) -> tuple[Path, Path]:
    """Write a base and an adapter of all its layers; returns their folders."""
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    adapter.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    modules: dict[str, object] = {}
    weight_map: dict[str, str] = {}
    for shard, file in enumerate(shard_names(shards)):
        weights = {}
        for matrix in range(matrices):
            name = f"model.layers.{shard}.linear{matrix}"
            weight = torch.randn(width, width, generator=generator).mul_(width**-0.5).to(torch.bfloat16)
            rows, cols = (torch.randperm(width, generator=generator)[:rank] for _ in range(2))
            tensors[f"{name}.U"] = torch.randn(rank, rank, generator=generator) / rank
            tensors[f"{name}.rows"], tensors[f"{name}.cols"] = rows.int(), cols.int()
            modules[name] = {
                "shape": [width, width], "rank": rank, "layout": "linear",
                "fingerprint": fingerprint(weight[rows], weight[:, cols]),
            }  # fmt: skip
            weights[f"{name}.weight"] = weight
            weight_map[f"{name}.weight"] = file
        save_file(weights, base / file, {"format": "pt"})
    (base / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    save_file(tensors, adapter / WEIGHTS_FILE)
    config = {
        "format_version": FORMAT_VERSION, "peft_type": "PMSS", "config": PMSSConfig(rank=rank).to_dict(),
        "modules": modules, "also_train": {},
    }  # fmt: skip
    (adapter / CONFIG_FILE).write_text(json.dumps(config))
    return base, adapter


def peak_growth(base: Path, adapter: Path, output: Path) -> int:
    """Merge in a fresh process; bytes by which its peak resident memory grew."""
    arguments = [sys.executable, "-c", _CHILD, str(base), str(adapter), str(output)]
    return int(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Run and print one line of figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("shards", 5), ("matrices", 8), ("width", 2048), ("rank", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = vars(parser.parse_args())
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base, adapter = make_inputs(folder, **options)
        start = time.perf_counter()
        grown = peak_growth(base, adapter, folder / "merged")
        seconds = time.perf_counter() - start
        files = [file.stat().st_size for file in base.glob("*.safetensors")]
        adapter_size = (adapter / WEIGHTS_FILE).stat().st_size
    matrix = 2 * options["width"] ** 2
    print(f"base {sum(files) / 1e6:.0f} MB in {len(files)} shards of {max(files) / 1e6:.0f} MB")
    print(f"matrix {matrix / 1e6:.1f} MB, adapter {adapter_size / 1e6:.1f} MB")
    print(f"peak memory grew by {grown / 1e6:.0f} MB; {seconds:.1f} s with start-up")


if __name__ == "__main__":
    main()
