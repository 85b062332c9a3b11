"""Forward and backward of Llama blocks: PMSS beside its rivals, in time and in bytes kept for the backward pass.

    python -m benchmarks.step                                     # the four cases of docs/performance.md
    python -m benchmarks.step --case 1024/256 --rivals frozen "pmss keep" "lora equal parameters" --rounds 9
    python -m benchmarks.step --sweep --plot docs/step.png        # time and memory against rank

All rivals share one process, one batch and the storage of the same base weights, and take turns step by step. A step is
forward and backward, to the trained parameters and to the input, float32 on one thread; the optimizer is left out. Time is
the process's own; a ratio is taken within a round, so that what else the machine does meanwhile touches both sides. Bytes are
exact: storages saved for backward that are neither parameters nor buffers, less those of the frozen blocks.
"""

from __future__ import annotations

import argparse
import json
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.machine import machine, spread, write_json
from benchmarks.rivals import PAIRS, RIVALS, Case, blocks, build, run, trained
from lightning_pmss.layers.indices import index_tensors

CASES = {c.name: c for c in (Case(1024, 128), Case(1024, 256), Case(2048, 256), Case(4096, 256, layers=1))}
SMALLEST = Case(64, 16, layers=1, length=8)
SWEEP = (32, 64, 128, 192, 256, 384, 512)
SWEPT = ("frozen", "pmss keep", "pmss regather", "naive", "lora equal rank", "lora equal parameters")
RESULTS = Path("benchmarks/results")


def step(model: nn.Module, x: Tensor, grad: Tensor) -> float:
    """Seconds of process time of one forward and backward pass."""
    x = x.detach().requires_grad_()
    for parameter in model.parameters():
        parameter.grad = None
    start = time.process_time()
    run(model, x).backward(grad)
    return time.process_time() - start


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes of the storages kept for backward that are neither parameters nor buffers nor the input."""
    x = x.detach().requires_grad_()
    own = {
        t.untyped_storage().data_ptr()
        for t in (*model.parameters(), *model.buffers(), *index_tensors(model).values(), x)
    }
    kept: list[weakref.ref[Tensor]] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(weakref.ref(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = run(model, x)
    # Only what the graph of y still holds: some rivals build graphs on the way that they detach from.
    alive = [tensor.untyped_storage() for reference in kept if (tensor := reference()) is not None]
    del y
    return sum({s.data_ptr(): s.nbytes() for s in alive if s.data_ptr() not in own}.values())


def bound(case: Case) -> float:
    """Counted multiply-adds of a step over the frozen linear layers': thin products and ``3 r^2``, coordinates left out."""
    base = sum(2 * out * inp for out, inp in case.shapes)
    return 1 + sum(2 * case.rank * min(shape) + 3 * case.rank**2 for shape in case.shapes) / base


def sensible(case: Case) -> list[str]:
    """All rivals but those that the case refuses or that are another one under two names."""
    float32 = case.dtype == "float32"
    left_out = {"lora equal parameters (base dtype)"} if float32 else {"pmss weight edit"}
    if case.tokens <= case.hidden:
        left_out.add("pmss weight edit")
    return [name for name in RIVALS if name not in left_out]


def compare(case: Case, rivals: Sequence[str], rounds: int) -> dict[str, Any]:
    """Measure one case."""
    torch.manual_seed(0)
    base = blocks(case)
    x = torch.randn(case.batch, case.length, case.hidden, dtype=getattr(torch, case.dtype))
    grad = torch.randn_like(x)
    models = {name: build(name, base, case) for name in rivals}
    floor = saved_bytes(models["frozen"], x)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for number in range(rounds + 1):
        # The order rotates: nobody always runs in the caches that the same neighbour left.
        names = list(models)[number % len(models) :] + list(models)[: number % len(models)]
        for name in names:
            taken = step(models[name], x, grad)
            if number:
                seconds[name].append(taken)
    figures = {}
    for name, model in models.items():
        figures[name] = {
            "trained": trained(model),
            "seconds": spread(seconds[name]),
            "saved_bytes_above_floor": saved_bytes(model, x) - floor,
        }
        for other in ("frozen", "lora equal rank", "lora equal parameters"):
            if other in models:
                ratios = [a / b for a, b in zip(seconds[name], seconds[other], strict=True)]
                figures[name][f"over {other}"] = spread(ratios)
        if (peft := PAIRS.get(name)) in models:
            assert peft is not None
            ratios = [a / b for a, b in zip(seconds[name], seconds[peft], strict=True)]
            figures[name]["over peft"] = spread(ratios)
    return {
        "case": vars(case) | {"tokens": case.tokens, "lora_rank": case.lora_rank},
        "counted_bound": round(bound(case), 4),
        "rounds": rounds,
        "floor_saved_bytes": floor,
        "rivals": figures,
        "machine": machine(),
    }


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    case = result["case"]
    known = {
        "frozen": "frozen",
        "lora equal rank": "LoRA, equal rank",
        "lora equal parameters": "LoRA, equal parameters",
        "peft": "peft's own",
    }
    others = {o: words for o, words in known.items() if any(f"over {o}" in f for f in result["rivals"].values())}
    lines = [
        f"hidden {case['hidden']}, rank {case['rank']}, {case['layers']} layer(s), {case['tokens']} tokens, {case['dtype']};"
        f" LoRA's equal-parameter rank {case['lora_rank']}; counted bound {result['counted_bound']:.3f}; medians (min - max)",
        "",
        "| | trained | seconds | "
        + " | ".join(f"/ {words}" for words in others.values())
        + " | saved, MiB above frozen |",
        "|---|--:|--:|" + "--:|" * len(others) + "--:|",
    ]
    for name, figures in result["rivals"].items():
        cells = [f"{figures['trained']:,}", f"{figures['seconds']['median']:.3f}"]
        for other in others:
            r = figures.get(f"over {other}")
            cells.append(f"{r['median']:.3f} ({r['min']:.3f} - {r['max']:.3f})" if r else "")
        cells.append(f"{figures['saved_bytes_above_floor'] / 2**20:.1f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Time and bytes against rank, one line a rival."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = sorted(results, key=lambda r: r["case"]["rank"])
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2))
    ranks = [r["case"]["rank"] for r in results]
    for name in results[0]["rivals"]:
        if name == "frozen":
            continue
        ratios = [[r["rivals"][name]["over frozen"][k] for r in results] for k in ("min", "median", "max")]
        (line,) = left.plot(ranks, ratios[1], marker="o", markersize=3, label=name)
        left.fill_between(ranks, ratios[0], ratios[2], alpha=0.12, color=line.get_color())
        saved = [r["rivals"][name]["saved_bytes_above_floor"] / 2**20 for r in results]
        right.plot(ranks, saved, marker="o", markersize=3, color=line.get_color())
    left.plot(ranks, [r["counted_bound"] for r in results], "k:", label="counted, PMSS without coordinates")
    case = results[0]["case"]
    left.set(xlabel="rank", ylabel="step / frozen blocks' step", title="time (median, min to max)")
    right.set(xlabel="rank", ylabel="MiB above the frozen blocks", title="saved for backward")
    figure.suptitle(
        f"Llama blocks: {case['layers']}, hidden {case['hidden']}, {case['tokens']} tokens, {case['dtype']}, one thread"
    )
    left.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", nargs="+", choices=[*CASES, "smallest"], default=list(CASES))
    parser.add_argument("--rivals", nargs="+", choices=list(RIVALS), help="default: all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, help="tokens per step, in sequences of the case's length (default: two)")
    parser.add_argument("--layers", type=int, help="blocks; default: the case's")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float64"), default="float32")
    parser.add_argument(
        "--sweep", action="store_true", help="one block of hidden 1024 at several ranks, instead of --case"
    )
    parser.add_argument("--plot", type=Path, help="draw what was measured against rank into this file")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument(
        "--tables", action="store_true", help="measure nothing; print and draw what the JSON files there hold"
    )
    options = parser.parse_args(arguments)
    if options.tables:
        for path in sorted(options.output.glob("step-*.json")):
            content = json.loads(path.read_text())
            print(*(table(r) for r in content.get("results", [content])), sep="\n\n", end="\n\n")
            if options.plot and "results" in content:
                plot(content["results"], options.plot)
        return
    torch.set_num_threads(1)
    chosen = [SMALLEST if name == "smallest" else CASES[name] for name in options.case]
    if options.sweep:
        chosen = [Case(1024, rank, layers=1) for rank in SWEEP]
    results = []
    for case in chosen:
        batch = case.batch if options.tokens is None else options.tokens // case.length
        case = Case(case.hidden, case.rank, options.layers or case.layers, batch, case.length, options.dtype)
        rivals = options.rivals or (SWEPT if options.sweep else sensible(case))
        results.append(compare(case, ["frozen", *(name for name in rivals if name != "frozen")], options.rounds))
        name = f"step-{case.hidden}-{case.rank}" + ("" if case.dtype == "float32" else f"-{case.dtype}")
        if not options.sweep:
            name += "" if options.tokens is None else f"-{case.tokens}-tokens"
            write_json(options.output / f"{name}.json", results[-1])
        print(table(results[-1]), end="\n\n", flush=True)
    if options.sweep:
        write_json(options.output / "step-sweep.json", {"results": results})
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
