"""The log of a run that goes on in another process."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from typing_extensions import override


class ContinuedCSVLogger(CSVLogger):
    """Lightning's `CSVLogger`, but ``metrics.csv`` keeps what an earlier process logged before the checkpoint.

    Lightning deletes the file of before. What came after the checkpoint is logged again, so that the file becomes that
    of a run which was never stopped.

    Args:
        before: Optimizer step of the checkpoint. None: not known, so that all is kept.
        options: Those of `CSVLogger`.
    """

    def __init__(self, *, before: int | None, **options: Any) -> None:
        super().__init__(**options)
        self.before = before

    @property
    @override
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """The writer, which begins with the earlier rows."""
        if self._experiment is None:
            rows = _rows(Path(self.log_dir, ExperimentWriter.NAME_METRICS_FILE))
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Experiment logs directory")  # says that they are lost
                writer = super().experiment
            writer.metrics = [row for row in rows if self.before is None or row["step"] < self.before]
            writer.save()
        return super().experiment

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:  # type: ignore[override]
        """Log what is not of before the checkpoint, such as the figures that every start logs at step 0."""
        if step is None or self.before is None or step >= self.before:
            super().log_metrics(dict(metrics), step)


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file as Lightning's writer holds them; a line that a kill has cut off is left out."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        text = file.read()
    found = []
    for row in csv.DictReader(text[: text.rfind("\n") + 1].splitlines()):
        if None not in row and None not in row.values() and row.get("step", "").isdecimal():
            found.append({name: value for name, value in row.items() if value} | {"step": int(row["step"])})
    return found
