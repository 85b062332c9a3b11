"""What a step of Muon costs beside one of AdamW, on trained cores alone: square matrices, in float32, with random gradients.

    python -m benchmarks.optimizer_step [--ranks 64 128 256 512] [--matrices 8] [--rounds 15] [--json FILE]

Milliseconds a matrix on one thread, CPU time of this process, both optimizers in turn. Muon is `torch.optim.Muon` as in
``configs/optimizer/muon.yaml``. ``layer_tokens`` is the comparison that counts: so many tokens through a frozen linear layer of
width 4096 (forward, and backward to its input) take as long on this machine as Muon's step of that layer's core.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import torch
from tqdm.auto import tqdm

from benchmarks.measure import interleaved, spread, table, times, write_result

WIDTH, TOKENS = 4096, 256


def optimizers(rank: int, matrices: int) -> dict[str, torch.optim.Optimizer]:
    """One optimizer each on matrices of its own, [rank, rank], with gradients."""

    def cores() -> list[torch.nn.Parameter]:
        made = [torch.nn.Parameter(torch.zeros(rank, rank)) for _ in range(matrices)]
        for core in made:
            core.grad = torch.randn(rank, rank)
        return made

    return {
        "adamw": torch.optim.AdamW(cores(), lr=1e-3, weight_decay=0.0),
        "muon": torch.optim.Muon(cores(), lr=1e-3, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
    }


def layer_seconds(width: int, tokens: int, rounds: int) -> float:
    """Median seconds of one token through a frozen layer [width, width], forward and backward, in float32."""
    weight, x = torch.randn(width, width), torch.randn(tokens, width, requires_grad=True)
    seconds = times(lambda: torch.nn.functional.linear(x, weight).sum().backward(), rounds, clock=time.process_time)
    return spread(seconds)["median"] / tokens


def measure(ranks: list[int], matrices: int, rounds: int, width: int = WIDTH) -> list[dict[str, Any]]:
    """One entry per rank: spreads of milliseconds a matrix, their ratio, and ``layer_tokens``."""
    token = layer_seconds(width, TOKENS, 5)
    found = []
    for rank in tqdm(ranks, desc="optimizer steps", unit="rank", file=sys.stderr):
        steppers = {name: optimizer.step for name, optimizer in optimizers(rank, matrices).items()}
        seconds = interleaved(steppers, rounds, clock=time.process_time)
        each = {name: spread([1e3 * s / matrices for s in values]) for name, values in seconds.items()}
        ratio = spread([m / a for m, a in zip(seconds["muon"], seconds["adamw"], strict=True)])
        tokens = each["muon"]["median"] / 1e3 / token
        found.append({"rank": rank, **each, "ratio": ratio, "layer_tokens": round(tokens, 1)})
    return found


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """The command line."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--matrices", type=int, default=8, help="cores of one optimizer")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--width", type=int, default=WIDTH, help="of the layer that the step is compared with")
    parser.add_argument("--json", help="write the figures here")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = measure(options.ranks, options.matrices, options.rounds, options.width)
    finally:
        torch.set_num_threads(threads)
    rows = [
        [
            e["rank"],
            e["adamw"]["median"],
            e["muon"]["median"],
            _range(e["muon"]),
            e["ratio"]["median"],
            e["layer_tokens"],
        ]
        for e in found
    ]
    print(table(["rank", "AdamW, ms", "Muon, ms", "min to max", "ratio", "tokens of the layer"], rows))
    return write_result(options.json, "optimizer_step", {"width": options.width, "ranks": found})


def _range(values: dict[str, float]) -> str:
    return f"{values['min']:.3g} to {values['max']:.3g}"


if __name__ == "__main__":
    main()
