"""What LLaMA-2-13B takes with FSDP2 on 8 devices, as tables for docs/estimate.md.

    python -m benchmarks.estimate_13b

Needs nothing but the architectures under tests/fixtures; no weights, no GPU, about half a minute.
"""

from __future__ import annotations

from pathlib import Path

from lightning_pmss import PMSSConfig
from lightning_pmss.estimate import Estimate, MethodEstimate, Run, estimate
from lightning_pmss.estimate.advice import remedies

ARCHITECTURES = Path(__file__).resolve().parent.parent / "tests" / "fixtures" / "architectures"
GB = 1e9


def shown(found: Estimate, method: MethodEstimate, cards: tuple[float, ...]) -> list[str]:
    dynamic = method.activations + method.logits + method.work
    numbers = (
        method.base,
        method.trained + method.factors,
        method.gradients + method.optimizer,
        method.gathered + method.buckets,
        method.activations,
        method.logits + method.work,
        method.reserve,
        method.total,
    )
    name = {"pmss": "PMSS", "lora": "LoRA", "full": "full"}[method.method]
    rank = "" if method.rank is None else f" {method.rank}"
    checkpointing = "yes" if found.run.gradient_checkpointing else "no"
    assert dynamic <= method.total
    fits = ["yes" if method.total <= card * GB else "no" for card in cards]
    files = [f"{size / GB:.2f}" for size in (method.checkpoint, method.adapter)]
    return [f"{name}{rank}", checkpointing, *(f"{size / GB:.2f}" for size in numbers), *fits, *files]


def print_table(header: list[str], rows: list[list[str]]) -> None:
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print(flush=True)


COLUMNS = [
    "method, rank",
    "checkpointing",
    "base",
    "V, factors",
    "grad., optim.",
    "gathered",
    "activations",
    "logits, work",
    "reserve",
    "**total**",
]


def llama_13b() -> None:
    rows = []
    for rank in (256, 512, 1024):
        for checkpointing in (False, True):
            run = Run(
                str(ARCHITECTURES / "llama-2-13b.json"),
                "fsdp2",
                8,
                config=PMSSConfig(rank=rank),
                micro_batch=4,
                sequence_length=512,
                gradient_checkpointing=checkpointing,
            )
            found = estimate(run, both=False)
            methods = found.methods if rank == 1024 else {k: v for k, v in found.methods.items() if k != "full"}
            rows += [shown(found, method, (24, 80)) for method in methods.values()]
            if found.methods["pmss"].total > 24 * GB:
                print(f"PMSS {rank} without checkpointing on 24 GB would fit with:")
                for remedy in remedies(run, 24 * GB):
                    print(f"    {remedy.change}: {remedy.total / GB:.2f} GB")
    print("\nLLaMA-2-13B, FSDP2 on 8 devices, bf16-true, AdamW, 4 x 512 tokens per device and pass (GB):\n")
    print_table([*COLUMNS, "24 GB", "80 GB", "checkpoint", "adapter"], rows)


def others() -> None:
    rows = []
    for strategy, devices in (("single", 1), ("ddp", 8), ("fsdp", 8), ("fsdp2", 8), ("zero2", 8), ("zero3", 8)):
        for name in ("llama-2-7b", "llama-2-13b", "mistral-7b", "gemma-7b", "llama-3.2-3b"):
            run = Run(
                str(ARCHITECTURES / f"{name}.json"),
                strategy,
                devices,
                config=PMSSConfig(rank=512),
                micro_batch=4,
                sequence_length=512,
                gradient_checkpointing=True,
            )
            found = estimate(run, ("pmss",), both=False)
            method = found.methods["pmss"]
            rows.append([name, strategy, str(devices), f"{method.total / GB:.1f}", f"{method.host / GB:.0f}"])
    print("PMSS at rank 512 with checkpointing, 4 x 512 tokens (GB):\n")
    print_table(["model", "strategy", "devices", "per device", "host memory per node"], rows)


if __name__ == "__main__":
    llama_13b()
    others()
