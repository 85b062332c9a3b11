"""The configuration of a run of ``fit`` that another command starts: a recipe, in a folder of its own."""

from __future__ import annotations

import copy
import pkgutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_pmss.messages import one_line

_GONE = "not there"


def in_folder(recipe: Mapping[str, Any], folder: Path, callbacks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the recipe with its logs, its checkpoints and its adapter in one folder.

    The recipe's loggers and the callbacks that save checkpoints are left out, and no merged model is written.

    Args:
        recipe: Whole configuration of ``fit``, plain data; it is not changed.
        folder: The run's folder.
        callbacks: Those of the run, behind the recipe's own.
    """
    config = copy.deepcopy(dict(recipe))
    place = str(folder.absolute())
    config["pmss"] = dict(config.get("pmss") or {}) | {"output_dir": place, "merge_on_save": None}
    trainer = config["trainer"] = dict(config.get("trainer") or {})
    trainer |= {
        "default_root_dir": place,
        "logger": made(
            "lightning.pytorch.loggers.CSVLogger", save_dir=place, name="", version="", flush_logs_every_n_steps=1
        ),
        "callbacks": [*without_savers(trainer.get("callbacks")), *callbacks],
        "enable_checkpointing": True,
        "enable_progress_bar": False,
    }
    config["ckpt_path"] = None
    return config


def continue_log(config: Mapping[str, Any], step: int | None) -> None:
    """Let a run's configuration keep ``metrics.csv``, which Lightning would begin anew.

    Args:
        config: Result of `in_folder`; it is changed.
        step: Optimizer step at which the run goes on; None: not known.
    """
    logger = config["trainer"]["logger"]
    logger |= made("lightning_pmss.runs.logger.ContinuedCSVLogger", **logger["init_args"], before=step)


def made(class_path: str, **init_args: Any) -> dict[str, Any]:
    """Return how a configuration writes an instance of a class."""
    return {"class_path": class_path, "init_args": init_args}


def callback_classes(callbacks: Any) -> list[tuple[type, Any]]:
    """Return the class of each callback of a configuration, with its entry."""
    given = [callbacks] if isinstance(callbacks, Mapping) else list(callbacks or [])
    return [(pkgutil.resolve_name(callback["class_path"]), callback) for callback in given]


def without_savers(callbacks: Any) -> list[Any]:
    """Return a recipe's callbacks without those that save checkpoints."""
    from lightning.pytorch.callbacks import Checkpoint

    return [callback for kind, callback in callback_classes(callbacks) if not issubclass(kind, Checkpoint)]


def differences(before: Any, now: Any, path: str = "") -> list[str]:
    """Return in words where two configurations differ, a line for each entry."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = dict.fromkeys([*before, *now])
        return [
            line
            for key in keys
            for line in differences(
                before.get(key, _GONE), now.get(key, _GONE), f"{path}.{key}" if path else one_line(str(key))
            )
        ]
    return [] if before == now else [f"{path} was {one_line(str(before))}, is {one_line(str(now))}"]
