"""How good and how fast `lupp` is beside `pivoted_qr`: residuals on a trained model's weights, seconds on one large matrix.

    python -m benchmarks.selection [--model models/SmolLM2-135M-Instruct] [--ranks 16 32 64 128 256] [--step 1]
        [--oversample 10] [--size 4096] [--repeats 3] [--json FILE]

Residuals ``||W - C C^+ W||_F / ||W||_F`` of every linear layer of the decoder (embedding and output head are left out: nothing
is selected of them), of its columns and of its rows, at each rank up to half the smaller side, as ratios to pivoted QR's.
The pivots of pivoted QR at a rank are the first of those at a larger one, so that it runs once per matrix. Seconds: one
synthetic bfloat16 matrix SIZE x SIZE, columns and rows, both rules in turn, on one thread, CPU time of this process.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from benchmarks.measure import interleaved, spread, table, write_result
from benchmarks.select import synthetic
from lightning_pmss.methods.pmss.config import PMSSConfig
from lightning_pmss.methods.pmss.selection import projection_residual, select_skeleton
from lightning_pmss.store.shards import ShardReader, open_shards


def linear_layers(reader: ShardReader) -> list[str]:
    """The weights of the decoder's linear layers."""
    skipped = ("embed", "lm_head", "wte", "wpe")
    return [
        key
        for key, info in reader.tensors.items()
        if key.endswith(".weight") and len(info.shape) == 2 and not any(word in key for word in skipped)
    ]


def ratios_of(weight: Tensor, ranks: list[int], name: str, oversample: int) -> list[dict[str, Any]]:
    """One entry per rank and side: both residuals."""
    fitting = [rank for rank in ranks if rank <= min(weight.shape) // 2]
    if not fitting:
        return []
    exact = select_skeleton(weight, max(fitting), selection="pivoted_qr", name=name)
    found = []
    for rank in fitting:
        fast = select_skeleton(weight, rank, selection="lupp", oversample=oversample, name=name)
        for side, matrix, wanted, got in (
            ("rows", weight.T, exact[0], fast[0]),
            ("columns", weight, exact[1], fast[1]),
        ):
            best, ours = projection_residual(matrix, wanted[:rank]), projection_residual(matrix, got)
            entry = {"matrix": name, "shape": list(weight.shape), "side": side, "rank": rank}
            found.append({**entry, "pivoted_qr": best, "lupp": ours, "ratio": ours / best})
    return found


def residuals(model: str, ranks: list[int], step: int, oversample: int) -> list[dict[str, Any]]:
    """`ratios_of` every `step`-th linear layer."""
    found = []
    with open_shards(model) as reader:
        for key in tqdm(linear_layers(reader)[::step], desc="residuals", unit="matrix", file=sys.stderr):
            found += ratios_of(reader.read(key), ranks, key.removesuffix(".weight"), oversample)
    return found


def by_rank(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and largest ratio of each rank, and the matrix of the latter."""
    found = []
    for rank in sorted({entry["rank"] for entry in entries}):
        same = [entry for entry in entries if entry["rank"] == rank]
        worst = max(same, key=lambda entry: float(entry["ratio"]))
        mean = sum(entry["ratio"] for entry in same) / len(same)
        over = sum(entry["ratio"] > 1.03 for entry in same)
        worst_name = f"{worst['matrix']} ({worst['side']})"
        found.append(
            {
                "rank": rank,
                "choices": len(same),
                "mean": mean,
                "max": worst["ratio"],
                "above_1.03": over,
                "worst": worst_name,
            }
        )
    return found


def seconds(size: int, rank: int, repeats: int, oversample: int) -> dict[str, Any]:
    """Both rules on one matrix."""
    weight = synthetic((size, size), torch.Generator().manual_seed(0))
    rules = {
        rule: partial(select_skeleton, weight, rank, selection=rule, oversample=oversample, name="w")
        for rule in ("lupp", "pivoted_qr")
    }
    times = interleaved(rules, repeats, clock=time.process_time)
    ratio = [slow / fast for fast, slow in zip(times["lupp"], times["pivoted_qr"], strict=True)]
    return {
        "size": size,
        "rank": rank,
        **{rule: spread(values) for rule, values in times.items()},
        "ratio": spread(ratio),
    }


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct", help="folder with safetensors weights")
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 32, 64, 128, 256])
    parser.add_argument("--step", type=int, default=1, help="every STEP-th linear layer only")
    parser.add_argument("--oversample", type=int, default=PMSSConfig().oversample)
    parser.add_argument("--size", type=int, default=4096, help="of the matrix for the times")
    parser.add_argument("--rank", type=int, default=256, help="for the times")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    entries = residuals(options.model, options.ranks, options.step, options.oversample)
    ranks = by_rank(entries)
    print(table(list(ranks[0]), [list(line.values()) for line in ranks]))
    timing = seconds(options.size, options.rank, options.repeats, options.oversample)
    rows = [(name, *timing[name].values()) for name in ("lupp", "pivoted_qr", "ratio")]
    print(table(["seconds", "min", "median", "max", "n"], rows))
    model = Path(options.model).name
    worst = sorted(entries, key=lambda entry: -float(entry["ratio"]))[:20]
    figures = {"model": model, "oversample": options.oversample, "by_rank": ranks, "seconds": timing, "largest": worst}
    write_result(options.json, "selection", figures)


if __name__ == "__main__":
    main()
