"""The configuration of one trial: the recipe with the trial's settings, in a folder of its own, stopped at the fraction."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lightning_pmss.runs.checkpoints import saver
from lightning_pmss.runs.configuration import in_folder, made

STOP = "lightning_pmss.search.stop.StopAtFraction"


def trial_config(
    recipe: Mapping[str, Any],
    folder: Path,
    fraction: float,
    monitor: str,
    mode: str,
    untrained: float | None,
    steps: int | None = None,
) -> str:
    """Return the configuration of a trial, as text.

    The recipe's loggers and `ModelCheckpoint` are left out, and no merged model is written.

    Args:
        recipe: Whole configuration of ``fit`` with the trial's settings, plain data.
        folder: The trial's folder.
        fraction: Where it stops.
        monitor: Its metric.
        mode: ``min`` or ``max``.
        untrained: The metric of the untrained model; None: measure it first.
        steps: Optimizer steps of the whole training, to save checkpoints on the way; None: save none.
    """
    options = {"fraction": fraction, "folder": str(folder.absolute()), "monitor": monitor, "mode": mode}
    savers = [] if steps is None else [saver(folder, steps)]
    config = in_folder(recipe, folder, [*savers, made(STOP, **options, untrained=untrained)])
    config["trainer"]["num_sanity_val_steps"] = -1 if untrained is None else 0
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True)


def warm_up(recipe: Mapping[str, Any]) -> float:
    """Return the share of the training in which the learning rate rises, as far as the recipe says it; else 0."""
    init = (recipe.get("model") or {}).get("init_args") or {}
    share = init.get("warmup_ratio", 0.0)
    return float(share) if isinstance(share, int | float) else 0.0
