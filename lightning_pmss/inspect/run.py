"""Read the files in a run's folder, without a model. Each file is checked; a bad one is reported and left out."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ConfigDict

from lightning_pmss.messages import one_line
from lightning_pmss.store import Record, checked, read_json, refuse_unreadable

Curve = list[tuple[int, float]]
Found = TypeVar("Found")
_LARGEST_STEP = 2**53  # beyond it, float64 cannot represent every step
_LARGEST_TEXT = 2**28  # bytes
ADAPTER_CONFIG = Path("adapter", "adapter_config.json")


class IntervalRecord(Record):
    """One score of ``summary-<stage>.json``."""

    mean: float
    low: float
    high: float
    n: int


class SummaryRecord(Record):
    """Entries of ``summary-<stage>.json`` that the page shows."""

    model_config = ConfigDict(extra="ignore")

    scores: dict[str, IntervalRecord]


class AdapterAbout(Record):
    """Entries of ``adapter_config.json`` that the page shows and `inspect_adapter` does not return."""

    model_config = ConfigDict(extra="ignore")

    base_model_name_or_path: str | None = None
    versions: dict[str, str] = {}


@dataclass
class Run:
    """The records of one run.

    Attributes:
        folder: Folder of the run.
        curves: Logged name -> (step, value) in the order of steps; from ``metrics.csv`` of Lightning's CSVLogger.
        config: Text of ``config.yaml``, or "".
        summaries: Stage -> the scores of ``summary-<stage>.json`` with their intervals.
        adapter: The adapter's folder, or None.
        about: Base and versions that the adapter records.
        sizes: File or folder of results -> bytes.
        faults: File name -> its error; such a file is in none of the others.
    """

    folder: Path
    curves: dict[str, Curve] = field(default_factory=dict)
    config: str = ""
    summaries: dict[str, dict[str, IntervalRecord]] = field(default_factory=dict)
    adapter: Path | None = None
    about: AdapterAbout = field(default_factory=AdapterAbout)
    sizes: dict[str, int] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)

    def last(self, name: str) -> float | None:
        """Return the last value logged under a name, or None."""
        return self.curves[name][-1][1] if self.curves.get(name) else None


def read_run(folder: str | Path) -> Run:
    """Read a run's folder (Lightning's log folder, such as ``runs/quickstart/version_0``).

    Raises:
        FileNotFoundError: The folder does not exist or contains none of a run's files; the message lists them.
        ValueError: None of the files can be read; the message has the error of the first.
    """
    run = Run(Path(folder).expanduser())
    if not run.folder.is_dir():
        raise FileNotFoundError(f"There is no folder {str(folder)!r}; type a run's log folder, as runs/NAME/version_0.")
    run.curves = _read(run, "metrics.csv", _curves) or {}
    run.config = _read(run, "config.yaml", _text) or ""
    for path in sorted(run.folder.glob("summary-*.json")):
        scores = _read(run, path.name, _scores)
        if scores is not None:
            run.summaries[one_line(path.stem.removeprefix("summary-"))] = scores
    about = _read(run, str(ADAPTER_CONFIG), _about)
    if about is not None:
        run.adapter, run.about = run.folder / ADAPTER_CONFIG.parent, about
    if not (run.curves or run.config or run.summaries or run.adapter):
        if run.faults:
            raise ValueError(next(iter(run.faults.values())))
        raise FileNotFoundError(
            f"{str(folder)!r} contains none of metrics.csv, config.yaml, summary-*.json and adapter/, so it is not a run's"
            f" folder.{_hint(run.folder)}"
        )
    for name in ("adapter", "merged", "checkpoints"):
        if (run.folder / name).is_dir():
            run.sizes[name] = _size(run.folder / name)
    return run


def _read(run: Run, name: str, read: Callable[[Path], Found]) -> Found | None:
    path = run.folder / name
    if not os.path.lexists(path):
        return None
    try:
        return read(path)
    except (OSError, ValueError) as error:
        run.faults[name] = one_line(error)
        return None


def _hint(folder: Path) -> str:
    versions = sorted(path.name for path in folder.iterdir() if path.name.startswith("version_") and path.is_dir())
    return f" Did you mean {one_line(folder / versions[-1])}?" if versions else ""


def _text(path: Path) -> str:
    refuse_unreadable(path)
    if (size := path.stat().st_size) > _LARGEST_TEXT:
        raise ValueError(f"{path} has {size:,} bytes, far more than such a file of a run can have.")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text: byte {error.start} is not UTF-8. Save it as UTF-8.") from error


def _curves(path: Path) -> dict[str, Curve]:
    """Read the curves by logged name; if the run was killed or is running, the last line may be cut off."""
    text = _text(path)
    lines = csv.reader(io.StringIO(text, newline=""))
    last = text.count("\n") + 1 if not text.endswith("\n") else 0  # the number of an unfinished line
    curves: dict[str, Curve] = {}
    try:
        names = next(lines, [])
        if "step" not in names or len(set(names)) < len(names):
            raise ValueError("its names lack `step`, or one occurs twice")
        for row in lines:
            if not row:
                continue
            if len(row) != len(names):
                if lines.line_num == last:
                    break
                raise ValueError(f"it has {len(row)} fields, the first line has {len(names)}")
            values = dict(zip(names, row, strict=True))
            step = int(values.pop("step"))
            if not 0 <= step < _LARGEST_STEP:
                raise ValueError(f"{row[names.index('step')][:20]} is not a number of steps")
            for name, value in values.items():
                if name != "epoch" and value and math.isfinite(number := float(value)):
                    curves.setdefault(one_line(name), []).append((step, number))
    except (csv.Error, ValueError) as error:
        reason = one_line(error)
        raise ValueError(
            f"{path}, line {lines.line_num}: not a line of Lightning's CSVLogger ({reason}). Correct or remove that line."
        ) from error
    return curves


def _scores(path: Path) -> dict[str, IntervalRecord]:
    remedy = "Run `test` again, which rewrites it."
    return checked(SummaryRecord, _json(path, remedy), str(path), remedy).scores


def _about(path: Path) -> AdapterAbout:
    remedy = "Copy the adapter's folder again."
    return checked(AdapterAbout, _json(path, remedy), str(path), remedy)


def _json(path: Path, remedy: str) -> Any:
    found = read_json(path, remedy)
    if not isinstance(found, dict):
        raise ValueError(f"{path} does not contain a JSON object. {remedy}")
    return found


def _size(folder: Path) -> int:
    """Size of the files below in bytes, without those behind links and those that cannot be read."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(root, name)).st_size
            except OSError:
                continue
    return total
