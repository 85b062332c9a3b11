"""Learning-rate schedules as a factor of the optimizer's own rate."""

from __future__ import annotations

import math

SCHEDULES = ("cosine", "linear", "constant")


def schedule_factor(step: int, *, kind: str, warmup_steps: int, total_steps: float) -> float:
    """Factor of the learning rate at optimizer step `step` (the first is 0).

    The warm-up rises in equal steps and reaches 1 at its last step: no step is spent at rate 0. The decay would reach 0
    one step after the last.

    Args:
        step: Optimizer steps taken so far.
        kind: ``"cosine"``, ``"linear"`` or ``"constant"`` (after the warm-up).
        warmup_steps: Steps of the warm-up.
        total_steps: Optimizer steps of the whole training; may be infinite for ``"constant"``.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if kind == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1.0, total_steps - warmup_steps))
    return 0.5 * (1.0 + math.cos(math.pi * progress)) if kind == "cosine" else 1.0 - progress
