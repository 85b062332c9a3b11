"""The configuration of one trial: the recipe with the trial's settings, in a folder of its own, stopped at the fraction."""

from __future__ import annotations

import copy
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

STOP = "lightning_pmss.search.stop.StopAtFraction"


def trial_config(
    recipe: Mapping[str, Any], folder: Path, fraction: float, monitor: str, mode: str, untrained: float | None
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
    """
    config = copy.deepcopy(dict(recipe))
    place = str(folder.absolute())
    stop = {"fraction": fraction, "folder": place, "monitor": monitor, "mode": mode, "untrained": untrained}
    trainer = config["trainer"] = dict(config.get("trainer") or {})
    trainer["callbacks"] = [*_kept(trainer.get("callbacks")), {"class_path": STOP, "init_args": stop}]
    trainer["logger"] = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": place, "name": "", "version": "logs"},
    }
    trainer["default_root_dir"] = place
    trainer["num_sanity_val_steps"] = -1 if untrained is None else 0
    trainer["enable_checkpointing"], trainer["enable_progress_bar"] = True, False
    config["pmss"] = dict(config.get("pmss") or {}) | {"output_dir": place, "merge_on_save": None}
    config["ckpt_path"] = None
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True)


def warm_up(recipe: Mapping[str, Any]) -> float:
    """Return the share of the training in which the learning rate rises, as far as the recipe says it; else 0."""
    init = (recipe.get("model") or {}).get("init_args") or {}
    share = init.get("warmup_ratio", 0.0)
    return float(share) if isinstance(share, int | float) else 0.0


def _kept(callbacks: Any) -> list[Any]:
    """The recipe's callbacks without those that save checkpoints."""
    from lightning.pytorch.callbacks import Checkpoint

    given = [callbacks] if isinstance(callbacks, Mapping) else list(callbacks or [])
    return [c for c in given if not issubclass(pkgutil.resolve_name(c["class_path"]), Checkpoint)]
