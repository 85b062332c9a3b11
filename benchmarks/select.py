"""Selecting rows and columns from files: wall time, matrices per second and peak memory at LLaMA-2-7B's matrix shapes.

    python -m benchmarks.select [--layers 2] [--distinct N] [--rank 256] [--workers N] [--skip-rules] [--folder DIR]
        [--json FILE]

Writes a synthetic bfloat16 checkpoint to a temporary folder (below DIR, where given), one shard per decoder layer (405 MB),
without embedding and output head, of which nothing is selected. The matrices are products of Gaussian factors with weights
1 / sqrt(k) plus noise, since a plain Gaussian matrix has no columns better than others. Selects in a fresh process and
prints the growth of its peak resident memory over what the imported libraries take. CPU seconds stand beside the wall time,
since other work on the machine lengthens the latter more. Then both rules, ``lupp`` and ``pivoted_qr``, select from each
matrix of one layer, on one thread. Peak memory: Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.machine import machine
from lightning_pmss.methods.pmss.selection import projection_residual, select_skeleton
from lightning_pmss.store.shards import INDEX_FILE, open_shards, shard_names

# Small products and a small model make the libraries allocate their buffers before the first reading.
_CHILD = """
import json, sys, time, torch
from pathlib import Path
from lightning_pmss.methods.pmss.config import PMSSConfig
from lightning_pmss.files.architecture import model_on_meta
from lightning_pmss.files.select import select_files
from lightning_pmss.files.process_memory import peak_memory
model, output, rank, workers = sys.argv[1:]
model_on_meta(Path(model))
torch.linalg.eigh(torch.randn(64, 64) @ torch.randn(64, 64))
before, cpu = peak_memory(), time.process_time()
report = select_files(model, output, PMSSConfig(rank=int(rank)), workers=int(workers) or None)
print(report, file=sys.stderr)
print(json.dumps({**report.to_dict(), "peak_growth": peak_memory() - before, "cpu_seconds": time.process_time() - cpu}))
"""


def llama_shapes(hidden: int, intermediate: int) -> dict[str, tuple[int, int]]:
    """The matrices of one decoder layer, ``(out, in)``."""
    square = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    wide = {f"mlp.{name}_proj": (intermediate, hidden) for name in ("gate", "up")}
    return {**square, **wide, "mlp.down_proj": (hidden, intermediate)}


def synthetic(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """A bfloat16 matrix whose singular values fall slowly."""
    inner = min(*shape) // 4
    left = torch.randn(shape[0], inner, generator=generator) * torch.arange(1, inner + 1).rsqrt()
    matrix = (left @ torch.randn(inner, shape[1], generator=generator)).mul_(inner**-0.5)
    for block in matrix.split(1024):  # in blocks, so that the noise takes little memory
        block += 0.5 * torch.randn(block.shape, generator=generator)
    return matrix.mul_(0.02).to(torch.bfloat16)


def make_checkpoint(
    folder: Path, *, layers: int, hidden: int = 4096, intermediate: int = 11008, shards: int = 0, distinct: int = 0
) -> Path:
    """Write ``config.json`` and as many shards (0: one per decoder layer); returns the folder.

    Making the matrices takes longer than selecting from them; with `distinct` only so many layers differ, and the
    others repeat them.
    """
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "vocab_size": 32000,
        "intermediate_size": intermediate, "num_hidden_layers": layers, "num_attention_heads": hidden // 128 or 1,
        "num_key_value_heads": hidden // 128 or 1, "tie_word_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    made: dict[tuple[int, str], Tensor] = {}
    files = shard_names(shards or layers)
    for number, file in enumerate(files):
        weights = {}
        for layer in range(number, layers, len(files)):
            for name, shape in llama_shapes(hidden, intermediate).items():
                key = (layer % distinct if distinct else layer, name)
                matrix = made[key] if key in made else synthetic(shape, generator)
                if distinct:
                    made[key] = matrix
                weights[f"model.layers.{layer}.{name}.weight"] = matrix
        save_file(weights, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(weights, file))
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def select_in_a_fresh_process(model: Path, output: Path, rank: int, workers: int = 0) -> dict[str, Any]:
    """The report of `select_files`, ``peak_growth`` (bytes by which the peak resident memory grew) and ``cpu_seconds``."""
    command = [sys.executable, "-c", _CHILD, str(model), str(output), str(rank), str(workers)]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return found


def compare_rules(model: Path, rank: int) -> list[dict[str, Any]]:
    """Seconds and residual of both rules on each matrix of the first shard, on one thread."""
    torch.set_num_threads(1)
    found = []
    with open_shards(model) as reader:
        first = reader.files[0]
        for key in [key for key, info in reader.tensors.items() if info.file == first]:
            weight = reader.read(key)
            entry: dict[str, Any] = {"matrix": key.removesuffix(".weight"), "shape": list(weight.shape)}
            for rule in ("lupp", "pivoted_qr"):
                start, cpu = time.perf_counter(), time.process_time()
                _, cols = select_skeleton(weight, rank, selection=rule, name=entry["matrix"])
                seconds = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
                entry[rule] = {**seconds, "residual": projection_residual(weight, cols)}
            found.append(entry)
            print(entry, file=sys.stderr)
    return found


def main() -> None:
    """Run, print the figures, and write them as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2, help="decoder layers (LLaMA-2-7B has 32)")
    parser.add_argument("--distinct", type=int, default=0, help="layers that differ, repeated; 0: all")
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--workers", type=int, default=0, help="0: the CPU cores at hand")
    parser.add_argument("--skip-rules", action="store_true", help="leave pivoted_qr beside lupp out")
    parser.add_argument("--folder", type=Path, help="where the temporary checkpoint goes")
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        model = make_checkpoint(folder / "model", layers=options.layers, distinct=options.distinct)
        report = select_in_a_fresh_process(model, folder / "skeleton.safetensors", options.rank, options.workers)
        rules = [] if options.skip_rules else compare_rules(model, options.rank)
        size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    wanted = (
        "selection", "workers", "selected", "seconds", "selecting_seconds", "cpu_seconds", "matrices_per_second",
        "mean_residual", "bytes", "peak_memory", "peak_growth",
    )  # fmt: skip
    result = {
        "layers": options.layers,
        "distinct_layers": options.distinct or options.layers,
        "rank": options.rank,
        "checkpoint_bytes": size,
        "largest_matrix_bytes": 2 * 4096 * 11008,
        "machine": machine(),
        **{key: report[key] for key in wanted},
        "rules": rules,
    }
    text = json.dumps(result, indent=2)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
