"""From how many tokens per micro-batch the weight edit is faster than the thin one: single float32 layers, side by side.

    python -m benchmarks.break_even                    # one CPU thread -> benchmarks/results/break-even.json

The frozen layer, the thin edit that ``auto`` takes and the weight edit take turns on one batch; forward and backward, ratios to
the frozen layer within a round. `benchmarks.gpu` runs the same on a GPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.machine import machine, spread, write_json
from lightning_pmss import PMSSConfig, convert
from lightning_pmss.methods.pmss.weight_edit import break_even_tokens

SHAPES = ((1024, 1024), (2816, 1024), (1024, 2816), (2048, 2048))  # out, in
RANKS = (128, 256)
MULTIPLES = (0.5, 1.0, 2.0, 4.0)


def process_ms(step: Callable[[], None]) -> float:
    start = time.process_time()
    step()
    return (time.process_time() - start) * 1e3


def break_even(
    shapes: Sequence[tuple[int, int]],
    ranks: Sequence[int],
    multiples: Sequence[float],
    *,
    device: str,
    rounds: int,
    clock: Callable[[Callable[[], None]], float] = process_ms,
) -> list[dict[str, Any]]:
    """One row a shape, rank and number of tokens, in multiples of the layer's wider side."""
    rows = []
    for out, inp in shapes:
        for rank in ranks:
            layers: dict[str, nn.Module] = {}
            for edit in ("frozen", "auto", "weight"):
                layers[edit] = nn.Sequential(nn.Linear(inp, out, bias=False, device=device)).requires_grad_(False)
                if edit != "frozen":
                    convert(layers[edit], PMSSConfig(rank=rank, selection="random", edit=edit))
            for multiple in multiples:
                tokens = int(multiple * max(out, inp))
                rows.append(_row(layers, torch.randn(tokens, inp, device=device), out, rounds, clock))
                rows[-1] |= {"out": out, "in": inp, "rank": rank, "tokens": tokens}
                print(table(rows[-1:], head=len(rows) == 1), flush=True)
    return rows


def _row(
    layers: dict[str, nn.Module], x: Tensor, out: int, rounds: int, clock: Callable[[Callable[[], None]], float]
) -> dict[str, Any]:
    grad = torch.randn(len(x), out, device=x.device)
    taken: dict[str, list[float]] = {name: [] for name in layers}
    for number in range(rounds + 1):
        for name, layer in layers.items():
            ms = clock(lambda layer=layer: layer(x.detach().requires_grad_()).backward(grad))  # type: ignore[misc]
            for parameter in layer.parameters():
                parameter.grad = None
            taken[name] += [ms] if number else []
    ratios = {n: spread([a / b for a, b in zip(taken[n], taken["frozen"], strict=True)]) for n in ("auto", "weight")}
    return {"thin over frozen": ratios["auto"], "weight over frozen": ratios["weight"]}


def table(rows: Sequence[dict[str, Any]], head: bool = True) -> str:
    lines = head * [
        "| out x in | rank | tokens | tokens / counted break-even | thin edit / frozen | weight edit / frozen |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        cells = [
            f"{row[k]['median']:.3f} ({row[k]['min']:.3f} - {row[k]['max']:.3f})" for k in row if k.endswith("frozen")
        ]
        counted = row["tokens"] / break_even_tokens((row["out"], row["in"]), row["rank"])
        lines.append(
            f"| {row['out']} x {row['in']} | {row['rank']} | {row['tokens']:,} | {counted:.2f} | "
            + " | ".join(cells)
            + " |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS))
    parser.add_argument("--smallest", action="store_true", help="a layer that shows only that the code runs")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/break-even.json"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    shapes, ranks = (((64, 64),), (16,)) if options.smallest else (SHAPES, options.ranks)
    rows = break_even(shapes, ranks, MULTIPLES, device="cpu", rounds=options.rounds)
    write_json(options.output, {"rows": rows, "rounds": options.rounds, "machine": machine()})


if __name__ == "__main__":
    main()
