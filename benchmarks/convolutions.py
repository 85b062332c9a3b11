"""A training step and the bytes that it keeps, of adapters on a convolution and on an embedding, beside peft's.

    python -m benchmarks.convolutions --json benchmarks/results/convolutions.json

The convolution is 3 x 3 with as many input as output channels, and its weight is frozen. All methods have one rank, so they
train different numbers. Times are of the process's CPU time, since other processes may share the cores.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.capability_methods import One
from benchmarks.kept import kept_bytes
from benchmarks.measure import interleaved, spread, table, write_result
from lightning_pmss import METHODS, convert


def rivals(layer: nn.Module, rank: int) -> dict[str, Any]:
    """The base, our methods and peft's LoRA, on the same weight."""
    import peft

    base = One(layer).requires_grad_(False)
    memo = {id(p): p for p in base.parameters()}
    found: dict[str, Any] = {"no adapter": base}
    for name, method in METHODS.items():
        if name == "bat" and isinstance(layer, nn.Embedding):
            continue
        for more in [{}, {"columns": "all"}] if name == "pmss" else [{}]:
            options: dict[str, Any] = {"target_modules": ["layer"], "rank": rank, **more}
            config = method.config_class(**options)
            model = copy.deepcopy(base, dict(memo))
            convert(model, config)
            found[config.label() + (", all columns" if more else "")] = model
    own = peft.LoraConfig(r=rank, target_modules=["layer"])
    found["LoRA of peft"] = peft.get_peft_model(copy.deepcopy(base, dict(memo)), own)  # type: ignore[arg-type]
    return found


def step(model: Any, x: Tensor) -> None:
    """One forward and backward pass, to the input where it has numbers."""
    y = model(x)
    if y.requires_grad:
        y.square().mean().backward()
    x.grad = None
    for parameter in model.parameters():
        parameter.grad = None


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print, write."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", help="write the figures here")
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--side", type=int, default=28)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=50000)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    image = torch.randn(options.images, options.channels, options.side, options.side, requires_grad=True)
    ids = torch.randint(0, options.vocabulary, (1, options.tokens))
    layers: dict[str, tuple[nn.Module, Tensor]] = {
        "convolution": (nn.Conv2d(options.channels, options.channels, 3, padding=1), image),
        "embedding": (nn.Embedding(options.vocabulary, options.width), ids),
    }
    figures: dict[str, Any] = {}
    for kind, (layer, x) in layers.items():
        models = rivals(layer, options.rank)
        keeps = {name: kept_bytes(model, lambda model=model, x=x: model(x)) for name, model in models.items()}  # type: ignore[misc]
        runs: dict[str, Callable[[], object]] = {n: lambda model=m, x=x: step(model, x) for n, m in models.items()}  # type: ignore[misc]
        times = interleaved(runs, options.repeats, clock=time.process_time)
        trained = {n: sum(p.numel() for p in m.parameters() if p.requires_grad) for n, m in models.items()}
        rows = [
            (
                name,
                trained[name],
                1000 * spread(times[name])["median"],
                (keeps[name] - keeps["no adapter"]) / 2**20,
            )
            for name in models
        ]
        print(table((kind, "trained", "step, ms of CPU time", "kept beyond the base's, MiB"), rows))
        figures[kind] = {"seconds": {n: spread(t) for n, t in times.items()}, "kept_bytes": keeps, "trained": trained}
    return write_result(options.json, "convolutions", {k: v for k, v in vars(options).items() if k != "json"} | figures)


if __name__ == "__main__":
    main()
