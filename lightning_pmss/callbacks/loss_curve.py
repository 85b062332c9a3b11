"""
Loss curve
^^^^^^^^^^

Draws the losses of a training as a picture.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only
from torch import Tensor
from typing_extensions import override

from lightning_pmss.modules.token_weighted import TokenWeighted
from lightning_pmss.store.disk import atomic_file


class LossCurve(L.Callback):
    """Collect the training loss of every step and the validation losses, and write ``loss.png`` when training ends.

    The training loss is the result of ``training_step``, averaged over processes and accumulated batches. The validation
    loss is the metric that ``validation`` names. Checkpoints contain the points, so a resumed run draws the whole curve.

    Args:
        dirpath: Folder of the picture; the trainer's log folder by default.
        validation: Name under which the validation loss is logged.
        smoothing: Steps of the running mean drawn over the training loss.

    Raises:
        ModuleNotFoundError: In ``setup``, if matplotlib is not installed.

    Example::

        >>> from lightning_pmss.callbacks.loss_curve import LossCurve
        >>> trainer = L.Trainer(callbacks=[LossCurve()])

    """

    def __init__(self, dirpath: str | None = None, validation: str = "val/loss", smoothing: int = 10) -> None:
        if smoothing < 1:
            raise ValueError(f"smoothing={smoothing!r} must be at least 1 step.")
        self.dirpath = dirpath
        self.validation = validation
        self.smoothing = smoothing
        self.path: Path | None = None
        self._folder = Path()
        self._train: list[tuple[int, Tensor | float]] = []
        self._val: list[tuple[int, float]] = []
        self._pending: list[Tensor] = []  # losses of the batches accumulated since the last optimizer step

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check that matplotlib is installed, before the training, and forget the steps of an earlier Trainer."""
        if stage == "fit" and importlib.util.find_spec("matplotlib") is None:
            raise ModuleNotFoundError(
                "`LossCurve` draws with matplotlib, which is not installed. Type: pip install 'lightning-pmss[plots]', "
                "or remove the callback."
            )
        if stage == "fit":  # a checkpoint's points are read later; a Trainer that goes on keeps its own
            self._train = [point for point in self._train if point[0] <= trainer.global_step]
            self._val = [point for point in self._val if point[0] <= trainer.global_step]
            self._pending.clear()

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Store the loss on its device: reading it here would synchronise host and device in every step."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        weighted = isinstance(pl_module, TokenWeighted) and hasattr(pl_module, "step_part")
        if isinstance(loss, Tensor):
            # Lightning divides the loss by accumulate_grad_batches, also where fewer batches are accumulated.
            whole = loss.detach() * trainer.accumulate_grad_batches
            self._pending.append(pl_module.step_part if weighted else whole)  # type: ignore[arg-type]
        last = self._train[-1][0] if self._train else 0
        if self._pending and trainer.global_step > last:
            step = torch.stack(self._pending).sum() / (1 if weighted else len(self._pending))
            self._train.append((trainer.global_step, trainer.strategy.reduce(step, reduce_op="mean")))
            self._pending.clear()

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Store the validation loss during ``fit``."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and self.validation in trainer.callback_metrics:
            self._val.append((trainer.global_step, float(trainer.callback_metrics[self.validation])))

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Determine the output folder before teardown, since reading the log folder is a collective."""
        self._folder = Path(self.dirpath or trainer.log_dir or trainer.default_root_dir)

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the picture, also for a finished run that is resumed, for which Lightning skips ``on_train_end``."""
        if not getattr(trainer, "fast_dev_run", False) and (self._train or self._val):
            self._write(self._folder / "loss.png")

    @rank_zero_only
    def _write(self, path: Path) -> None:
        train, val = self.points()
        with atomic_file(path) as new, new.open("wb") as file:
            draw(file, train, val, self.smoothing)
        self.path = path
        rank_zero_info(f"Loss curve of {len(train)} steps: {path}")

    def points(self) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
        """Training and validation losses as (optimizer step, loss)."""
        train = [(step, float(loss)) for step, loss in self._train]
        self._train = list(train)
        return train, list(self._val)

    @override
    def state_dict(self) -> dict[str, Any]:
        train, val = self.points()
        return {"train": [list(point) for point in train], "val": [list(point) for point in val]}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._train = [(step, loss) for step, loss in state_dict["train"]]
        self._val = [(step, loss) for step, loss in state_dict["val"]]


def draw(file: BinaryIO, train: list[tuple[int, float]], val: list[tuple[int, float]], smoothing: int) -> None:
    """Write a picture of (optimizer step, loss) points; `smoothing` is the width of the running mean in steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A separate figure with the Agg canvas uses neither pyplot's global state nor a display.
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="optimizer step", ylabel="loss per response token", title="Loss")
    finite = [(step, loss) for step, loss in train if math.isfinite(loss)]
    if finite:
        steps, losses = zip(*finite, strict=True)
        means = [
            sum(part) / len(part)
            for end in range(len(losses))
            if (part := losses[max(0, end + 1 - smoothing) : end + 1])
        ]
        axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1, label="training, per step")
        axes.plot(steps, means, color="tab:blue", label=f"training, mean of {smoothing} steps")
    if val:
        axes.plot(*zip(*val, strict=True), color="tab:orange", marker="o", label="validation")
    if finite or val:
        axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(file, format="png", dpi=120)
