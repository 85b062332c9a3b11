"""Changes that make a run fit into memory; each is tried by its own estimate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning_pmss.estimate.memory import estimate
from lightning_pmss.estimate.run import Run, with_options

CHECKPOINTING = "--gradient-checkpointing"
MOST_DEVICES = 64
RANK_STEP = 16


@dataclass(frozen=True)
class Remedy:
    """One change of the options, and the memory that a device needs with it.

    Attributes:
        change: The options to type.
        total: Bytes per device.
    """

    change: str
    total: int


def remedies(run: Run, gpu: float) -> list[Remedy]:
    """List single changes with which the run's method fits, and combinations with checkpointing where that alone is not enough.

    Args:
        run: A run that does not fit.
        gpu: Memory of one device in bytes.
    """
    found = _tried(run, gpu)
    if run.gradient_checkpointing or any(r.change == CHECKPOINTING for r in found):
        return found
    both = _tried(with_options(run, gradient_checkpointing=True), gpu)
    return [*(Remedy(f"{CHECKPOINTING} {r.change}", r.total) for r in both), *found]


def _tried(run: Run, gpu: float) -> list[Remedy]:
    changes: list[tuple[str, dict[str, Any]]] = []
    if not run.gradient_checkpointing:
        changes.append((CHECKPOINTING, {"gradient_checkpointing": True}))
    if run.micro_batch > 1:
        changes.append(("--micro-batch 1 (and accumulate gradients)", {"micro_batch": 1}))
    if run.strategy in ("single", "ddp") and run.quantisation is None:
        changes.append(("--quantisation nf4", {"quantisation": "nf4"}))
    if run.strategy in ("ddp", "zero2") and run.quantisation is None:
        changes.append(("--strategy fsdp2", {"strategy": "fsdp2"}))
    found = [Remedy(text, total) for text, options in changes if (total := _total(run, **options)) <= gpu]
    if (fewer := _largest_rank(run, gpu)) is not None:
        found.append(fewer)
    if run.quantisation is not None:  # quantised weights cannot be sharded
        return found
    more = run if run.strategy not in ("single", "ddp", "zero2") else with_options(run, strategy="fsdp2")
    devices = run.devices
    while devices * run.nodes < MOST_DEVICES:
        devices *= 2
        if (total := _total(more, devices=devices)) <= gpu:
            strategy = "" if more.strategy == run.strategy else f" --strategy {more.strategy}"
            found.append(Remedy(f"--devices {devices}{strategy} (or the same number on more nodes)", total))
            break
    if run.strategy != "zero3_offload" and (total := _total(run, strategy="zero3_offload")) <= gpu:
        found.append(Remedy("--strategy zero3_offload (slow, and see the host's memory)", total))
    return found


def _largest_rank(run: Run, gpu: float) -> Remedy | None:
    """Bisect for the largest multiple of `RANK_STEP` below the rank that fits."""
    low, high = 1, (run.config.rank - 1) // RANK_STEP  # in steps; `low` fits
    if high < 1 or _total(run, rank=RANK_STEP) > gpu:
        return None
    while low < high:
        middle = (low + high + 1) // 2
        if _total(run, rank=middle * RANK_STEP) <= gpu:
            low = middle
        else:
            high = middle - 1
    return Remedy(f"--rank {low * RANK_STEP}", _total(run, rank=low * RANK_STEP))


def _total(run: Run, **options: Any) -> int:
    own = run.config.method
    return estimate(with_options(run, **options), (own,), both=False).methods[own].total
