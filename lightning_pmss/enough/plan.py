"""The runs of a study: how many steps each has, and the configuration of each one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from lightning_pmss.datamodules.options import KIND
from lightning_pmss.messages import one_line
from lightning_pmss.runs.checkpoints import saver, step_at
from lightning_pmss.runs.configuration import callback_classes, continue_log, in_folder, made

RECORD = "lightning_pmss.runs.record.RunRecord"
_NEVER = 10**9  # batches


@dataclass(frozen=True)
class Run:
    """One run of a study.

    Args:
        size: Training examples.
        seed: Seed.
        folder: Its folder.
    """

    size: int
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        """Its name for people."""
        return f"{self.size:,} examples, seed {self.seed}"


@dataclass(frozen=True)
class Plan:
    """A study: what is trained, on how many examples, and what is read from it.

    Args:
        recipe: Whole configuration of ``fit`` with the recipe's own amount of data, plain data.
        sizes: Training examples of the runs, increasing.
        seeds: Number of seeds.
        equal: Whether runs of all sizes have equally many steps or epochs.
        steps: Optimizer steps of each run, where these are equal.
        epochs: Epochs of each run, where these are equal.
        steps_per_example: Optimizer steps that an example makes in an epoch, about.
        kind: Value of ``train_limit_by``.
        validations: Validations of a run, about; the last one is after the last step.
        monitor: The score.
        data: What identifies the data of the study.
        output: Folder of the study.
    """

    recipe: Mapping[str, Any]
    sizes: tuple[int, ...]
    seeds: int
    equal: Literal["steps", "epochs"]
    steps: int
    epochs: int
    steps_per_example: float
    kind: str | None
    validations: int
    monitor: str
    data: Mapping[str, Any]
    output: Path

    @property
    def first_seed(self) -> int:
        """The recipe's seed, of the first run of each size."""
        found = self._data.get("seed", 0)
        return found if isinstance(found, int) else 0

    @property
    def _data(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.recipe["data"]["init_args"]
        return found

    def runs(self) -> Iterator[Run]:
        """Yield the runs, all sizes of one seed after the other, so that a curve shows early."""
        for seed in range(self.first_seed, self.first_seed + self.seeds):
            for size in self.sizes:
                yield Run(size, seed, self.output / f"n{size}-seed{seed}")

    def weight(self, run: Run) -> float:
        """Return the work of a run in optimizer steps, about."""
        return float(self.steps) if self.equal == "steps" else self.epochs * max(1.0, run.size * self.steps_per_example)

    @property
    def drawn(self) -> str:
        """How subsets are drawn, in words."""
        if self.kind is None:
            return "subsets are drawn at random"
        what = "the kinds of examples" if self.kind == KIND else f"the column {one_line(self.kind)}"
        return f"subsets keep the shares of {what}"

    @property
    def seen(self) -> int | None:
        """Examples that equal steps hold, where these are fewer than the largest size; else null."""
        seen = math.floor(self.steps / self.steps_per_example + 0.5)
        return seen if self.equal == "steps" and seen < self.sizes[-1] else None

    def bound(self) -> dict[str, Any]:
        """Return what all runs in a folder share; sizes and seeds may be added later."""
        length = {"steps": self.steps} if self.equal == "steps" else {"epochs": self.epochs}
        return {
            "recipe": dict(self.recipe),
            "equal": self.equal,
            **length,
            "train_limit_by": self.kind,
            "validations": self.validations,
            "data": dict(self.data),
        }

    def config(self, run: Run, checkpoint: Path | None) -> str:
        """Return the configuration of a run as text.

        Its own logger, checkpoints and validations replace the recipe's, and no merged model is written.

        Args:
            run: The run.
            checkpoint: Where it goes on; null: from the beginning.
        """
        steps = round(self.weight(run))
        callbacks = [made(RECORD, folder=str(run.folder.absolute()), monitor=self.monitor), saver(run.folder, steps)]
        config = in_folder(self.recipe, run.folder, callbacks)
        split = self._data.get("split_seed")
        config["data"]["init_args"] |= {
            "train_limit": run.size,
            "train_limit_by": self.kind,
            "seed": run.seed,
            "split_seed": self.first_seed if split is None else split,
        }
        config["seed_everything"] = _shifted(config.get("seed_everything"), run.seed - self.first_seed)
        accumulate = config["trainer"].get("accumulate_grad_batches") or 1
        batches = math.ceil(self.weight(run) * accumulate / self.validations)
        config["trainer"] |= {
            "max_steps": self.steps if self.equal == "steps" else -1,
            "max_epochs": -1 if self.equal == "steps" else self.epochs,
            "min_steps": None,
            "min_epochs": None,
            "check_val_every_n_epoch": None,
            "val_check_interval": _NEVER if self.validations == 1 else batches,
            "num_sanity_val_steps": 1,
        }
        if checkpoint is not None:
            config["ckpt_path"] = str(checkpoint)
            continue_log(config, step_at(checkpoint))
        return yaml.safe_dump(config, sort_keys=False, allow_unicode=True)


def _shifted(seed: Any, by: int) -> Any:
    """The seed of everything random; ``true`` would draw one, so that no run could be repeated."""
    return (0 if isinstance(seed, bool) or seed is None else int(seed)) + by


def refuse_early_ends(callbacks: Any) -> None:
    """Refuse callbacks of a recipe that may end a run early.

    Raises:
        ValueError: There is one.
    """
    from lightning.pytorch.callbacks import EarlyStopping, Timer

    for kind, _ in callback_classes(callbacks):
        if issubclass(kind, EarlyStopping | Timer):
            raise ValueError(
                f"the recipe has {kind.__name__}, so runs of different sizes would end at different steps. Leave it out of"
                " --trainer.callbacks."
            )
