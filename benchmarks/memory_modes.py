"""What `memory="keep"` costs and gains against `"regather"`: time and bytes of one layer's forward and backward pass.

    python -m benchmarks.memory_modes

Both modes and the frozen layer run interleaved in one process, on one thread, by process time; the figures are medians of
the ratios to the frozen layer (with quartiles), and exact bytes saved for the backward pass.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor, nn

from lightning_pmss import PMSSConfig, convert
from lightning_pmss.layers import MEMORY_MODES

CASES = [  # out, in, rank, tokens
    (1024, 1024, 128, 512),
    (1024, 1024, 256, 512),
    (2816, 1024, 256, 512),
    (1024, 2816, 256, 512),
    (2048, 2048, 256, 512),
]
ROUNDS = 15


def step(layer: nn.Module, x: Tensor) -> float:
    start = time.process_time()
    layer(x).sum().backward()
    return time.process_time() - start


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """Bytes of the storages kept for backward that are neither parameters nor buffers nor the input."""
    own = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers(), x)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return sum(kept.values())


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{'out x in':>12} {'rank':>5} {'tokens':>6}  {'mode':8} {'time / frozen (quartiles)':>27} {'saved KiB':>10}")
    for out, features, rank, tokens in CASES:
        layers: dict[str, nn.Module] = {"frozen": nn.Linear(features, out, bias=False).requires_grad_(False)}
        for mode in MEMORY_MODES:
            layers[mode] = nn.Sequential(nn.Linear(features, out, bias=False))
            convert(layers[mode], PMSSConfig(rank=rank, memory=mode))
        x = torch.randn(tokens, features, requires_grad=True)
        times: dict[str, list[float]] = {name: [] for name in layers}
        for _ in range(ROUNDS):
            for name, layer in layers.items():
                times[name].append(step(layer, x))
        for mode in MEMORY_MODES:
            ratios = [a / b for a, b in zip(times[mode][2:], times["frozen"][2:], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            kept = saved_bytes(layers[mode], x) / 1024
            shape = f"{out} x {features}"
            print(
                f"{shape:>12} {rank:5} {tokens:6}  {mode:8} {middle:13.3f} ({low:.3f}-{high:.3f}) {kept:10.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
