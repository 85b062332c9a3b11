"""One CUDA GPU, random weights of LLaMA-2-7B's and 13B's shapes, under eight minutes, nothing to download.

    python -m benchmarks.gpu                        # -> benchmarks/results/gpu-<name>.json and tables
    python -m benchmarks.gpu --sections blocks selection --budget 240

Sections: ``blocks`` (all rivals, eager), ``compiled``, ``whole`` (all 32 layers of the 7B), ``weight_edit`` (from how many
tokens it pays), ``selection`` (rows and columns of all 224 matrices). Times are CUDA events around forward and backward, rivals
taking turns; memory is the allocator's peak during a step above what stood before it, and what each rival adds to the model.
What no longer fits into the time or the memory is named under ``skipped``. Without a GPU the same code runs its smallest case
on the CPU, which shows that it works and nothing about speed.
"""

from __future__ import annotations

import argparse
import gc
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.break_even import break_even
from benchmarks.machine import machine, spread, write_json
from benchmarks.rivals import RIVALS, Case, blocks, build, run, trained
from lightning_pmss.layers.indices import index_tensors
from lightning_pmss.methods.pmss.selection import select_skeleton

GPU_CASES = (
    Case(4096, 256, layers=2, batch=2, length=2048, dtype="bfloat16"),
    Case(4096, 256, layers=2, batch=8, length=2048, dtype="bfloat16"),
    Case(5120, 256, layers=2, batch=2, length=2048, dtype="bfloat16"),
)
CPU_CASES = (Case(64, 16, layers=1, batch=1, length=8, dtype="bfloat16"),)
COMPILED = ("frozen", "pmss regather", "pmss keep", "lora equal parameters", "lora equal parameters (base dtype)")
WHOLE = ("frozen", "pmss regather", "lora equal parameters", "lora equal parameters (base dtype)")
# In bfloat16, where the weight edit is refused.
EAGER = tuple(name for name in RIVALS if name != "pmss weight edit")


class Clock:
    """Seconds left of the budget, and what was skipped for lack of them."""

    def __init__(self, budget: float) -> None:
        self.end = time.monotonic() + budget
        self.skipped: list[str] = []

    def enough(self, seconds: float, what: str) -> bool:
        left = self.end - time.monotonic()
        if left < seconds:
            self.skipped.append(f"{what}: {max(left, 0):.0f} s left, {seconds:.0f} s wanted")
        return left >= seconds


def timed(step: Callable[[], None], device: str) -> tuple[float, int]:
    """(Milliseconds, peak bytes above what was allocated before) of one call."""
    if device != "cuda":
        start = time.process_time()
        step()
        return (time.process_time() - start) * 1e3, 0
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    step()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last), torch.cuda.max_memory_allocated() - before


def free() -> None:
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def own_bytes(model: nn.Module, base: nn.Module) -> int:
    """Bytes of the parameters, buffers and indices that a rival adds."""
    there = {t.untyped_storage().data_ptr() for t in (*base.parameters(), *base.buffers())}
    held = *model.parameters(), *model.buffers(), *index_tensors(model).values()
    added = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    return sum(size for address, size in added.items() if address not in there)


def compare(
    case: Case, rivals: Sequence[str], device: str, clock: Clock, *, rounds: int, seconds: float, compiled: bool = False
) -> dict[str, Any]:
    """All rivals on one base, taking turns; ``seconds``: time wanted for each, building and warming up included."""
    torch.manual_seed(0)
    base = blocks(case, device)
    x = torch.randn(case.batch, case.length, case.hidden, dtype=getattr(torch, case.dtype), device=device)
    grad = torch.randn_like(x)
    steps: dict[str, Callable[[], None]] = {}
    figures: dict[str, dict[str, Any]] = {}
    what = f"{case.name}, {case.layers} layers, {case.tokens} tokens" + (", compiled" if compiled else "")
    for name in rivals:
        if not clock.enough(seconds, f"{what}, {name}"):
            continue
        try:
            model = build(name, base, case)
            call = partial(run, model)
            if compiled:
                call = torch.compile(call, fullgraph=name.startswith(("pmss", "frozen")))  # type: ignore[assignment]
            step = _step(call, model, x, grad)
            first = timed(step, device)[0]
            _, peak = timed(step, device)
        except (torch.cuda.OutOfMemoryError, RuntimeError) as error:
            clock.skipped.append(f"{what}, {name}: {type(error).__name__}: {str(error).splitlines()[0]}")
            free()
            continue
        steps[name] = step
        figures[name] = {
            "trained": trained(model),
            "added_bytes": own_bytes(model, base),
            "first_step_ms": round(first, 1),
            "peak_bytes_of_step": peak,
        }
    times: dict[str, list[float]] = {name: [] for name in steps}
    frames = len(torch._dynamo.utils.counters["frames"])
    before = dict(torch._dynamo.utils.counters["frames"])
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(timed(step, device)[0])
    recompiled = frames and dict(torch._dynamo.utils.counters["frames"]) != before
    for name, values in times.items():
        figures[name]["ms"] = spread(values)
        for other in ("frozen", "lora equal rank", "lora equal parameters"):
            if other in times:
                ratios = [a / b for a, b in zip(values, times[other], strict=True)]
                figures[name][f"over {other}"] = spread(ratios)
    result = {"case": vars(case) | {"tokens": case.tokens, "lora_rank": case.lora_rank}, "rivals": figures}
    return result | ({"compiled": True, "recompiled_while_timed": bool(recompiled)} if compiled else {})


def _step(call: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], None]:
    def step() -> None:
        call(x.detach().requires_grad_()).backward(grad)
        for parameter in model.parameters():
            parameter.grad = None  # the next one starts from the same memory

    return step


def selection(device: str, clock: Clock, *, hidden: int, layers: int, rank: int) -> dict[str, Any] | None:
    """Seconds to select rows and columns of all matrices of a model; the weights of one block stand for all."""
    if not clock.enough(30 if device == "cuda" else 0, "selection"):
        return None
    shapes = Case(hidden, rank).shapes
    weights = [
        torch.randn(shape, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
        for shape in shapes
    ]
    seconds = []
    peak = 0
    for layer in range(layers):
        start = time.perf_counter()
        for number, weight in enumerate(weights):
            _, bytes_of_one = timed(lambda w=weight, n=number: select_skeleton(w, rank, seed=n), device)  # type: ignore[misc]
            peak = max(peak, bytes_of_one)
        seconds.append(time.perf_counter() - start)
        if not clock.enough(5 if device == "cuda" else 0, f"selection of layers {layer + 2} to {layers}"):
            break
    return {
        "matrices": len(seconds) * len(shapes),
        "rank": rank,
        "seconds": round(sum(seconds), 2),
        "seconds_per_block": spread(seconds),
        "peak_bytes": peak,
    }


def table(result: dict[str, Any]) -> str:
    """One comparison as a Markdown table."""
    case = result["case"]
    title = f"hidden {case['hidden']}, rank {case['rank']}, {case['layers']} layer(s), {case['tokens']} tokens, {case['dtype']}"
    lines = [
        title + (", compiled" if result.get("compiled") else ""),
        "",
        "| | trained | ms | / frozen | / LoRA, equal parameters | peak of a step, MiB | added to the model, MiB |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, f in result["rivals"].items():
        ratios = [
            f.get(f"over {other}", {"median": float("nan")})["median"] for other in ("frozen", "lora equal parameters")
        ]
        lines.append(
            f"| {name} | {f['trained']:,} | {f['ms']['median']:.2f} | {ratios[0]:.3f} | {ratios[1]:.3f} |"
            f" {f['peak_bytes_of_step'] / 2**20:.0f} | {f['added_bytes'] / 2**20:.1f} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    sections = ("blocks", "compiled", "selection", "weight_edit", "whole")
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sections", nargs="+", choices=sections, default=list(sections))
    parser.add_argument("--rivals", nargs="+", choices=list(RIVALS), help="default: all that fit")
    parser.add_argument("--budget", type=float, default=450, help="seconds")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="folder of the JSON file")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gpu = device == "cuda"
    if not gpu:
        print(
            "No CUDA GPU: the smallest case on the CPU, to show that the code runs. These are no figures to report.\n"
        )
    clock = Clock(options.budget)
    found: dict[str, Any] = {"machine": machine(), "device": device}

    def chosen(names: Sequence[str]) -> list[str]:
        return ["frozen", *(n for n in names if n != "frozen" and (options.rivals is None or n in options.rivals))]

    def add(section: str, result: dict[str, Any]) -> None:
        found.setdefault(section, []).append(result)
        print(table(result), end="\n\n", flush=True)
        free()

    cases = GPU_CASES if gpu else CPU_CASES
    if "blocks" in options.sections:
        for case in cases:
            add("blocks", compare(case, chosen(EAGER), device, clock, rounds=10 if gpu else 2, seconds=3 if gpu else 0))
    if "selection" in options.sections:
        sizes = {"hidden": 4096, "layers": 32, "rank": 256} if gpu else {"hidden": 64, "layers": 1, "rank": 8}
        found["selection"] = selection(device, clock, **sizes)
        free()
    if "weight_edit" in options.sections:
        shapes = [(w, w) for w in (1024, 2048, 4096)] if gpu else [(64, 64)]
        for shape in shapes:
            if clock.enough(20 if gpu else 0, f"weight edit at width {shape[0]}"):
                rows = break_even(
                    [shape],
                    [256] if gpu else [16],
                    (1, 2, 4, 8) if gpu else (1, 2),
                    device=device,
                    rounds=6,
                    clock=lambda step: timed(step, device)[0],
                )
                found.setdefault("weight_edit", []).extend(rows)
        free()
    if "whole" in options.sections:
        case = replace(cases[0], layers=32, batch=1, length=4096) if gpu else cases[0]
        room = not gpu or torch.cuda.get_device_properties(0).total_memory > 60 * 2**30
        if room:
            add("whole", compare(case, chosen(WHOLE), device, clock, rounds=5 if gpu else 1, seconds=40 if gpu else 0))
        else:
            clock.skipped.append("whole: the 7B in bfloat16 at 4,096 tokens wants 60 GiB of GPU memory")
    if "compiled" in options.sections:
        case = replace(cases[0], layers=1)
        names = chosen(COMPILED if gpu else COMPILED[:2])
        add(
            "compiled",
            compare(case, names, device, clock, rounds=10 if gpu else 2, seconds=40 if gpu else 0, compiled=True),
        )
    found["skipped"] = clock.skipped
    for line in clock.skipped:
        print(f"skipped: {line}")
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()) if gpu else "none-cpu-smallest"
    write_json(options.output / f"gpu-{name}.json", found)
    return found


if __name__ == "__main__":
    main()
