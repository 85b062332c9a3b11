"""What a run has left in its folder, read without a model."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Curve = list[tuple[int, float]]


@dataclass
class Run:
    """The records of one run.

    Attributes:
        folder: Where they lie.
        curves: Logged name -> (step, value) in the order of steps; from ``metrics.csv`` of Lightning's CSVLogger.
        config: Text of ``config.yaml``, or "".
        summaries: Stage -> what ``summary-<stage>.json`` holds (scores with their intervals).
        adapter: The adapter's folder, or None.
        adapter_config: Its ``adapter_config.json``, or {}.
        sizes: File or folder of results -> bytes.
    """

    folder: Path
    curves: dict[str, Curve] = field(default_factory=dict)
    config: str = ""
    summaries: dict[str, dict[str, Any]] = field(default_factory=dict)
    adapter: Path | None = None
    adapter_config: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    def last(self, name: str) -> float | None:
        """The last value logged under a name."""
        return self.curves[name][-1][1] if self.curves.get(name) else None


def read_run(folder: str | Path) -> Run:
    """Read a run's folder (Lightning's log folder, such as ``runs/quickstart/version_0``).

    Raises:
        FileNotFoundError: If there is no such folder, or none of a run's files is in it; names what would be read.
        ValueError: If one of the files cannot be read as what it should be.
    """
    run = Run(Path(folder).expanduser())
    if not run.folder.is_dir():
        raise FileNotFoundError(f"There is no folder {str(folder)!r}; type a run's log folder, as runs/NAME/version_0.")
    if (metrics := run.folder / "metrics.csv").is_file():
        run.curves = _curves(metrics)
    if (config := run.folder / "config.yaml").is_file():
        run.config = config.read_text(encoding="utf-8")
    for path in sorted(run.folder.glob("summary-*.json")):
        run.summaries[path.stem.removeprefix("summary-")] = _json(path)
    if (run.folder / "adapter" / "adapter_config.json").is_file():
        run.adapter = run.folder / "adapter"
        run.adapter_config = _json(run.adapter / "adapter_config.json")
    if not (run.curves or run.config or run.summaries or run.adapter):
        inside = sorted(p.name for p in run.folder.iterdir() if p.is_dir())
        versions = [name for name in inside if name.startswith("version_")]
        hint = f" Did you mean {run.folder / versions[-1]}?" if versions else ""
        raise FileNotFoundError(
            f"{str(folder)!r} holds none of metrics.csv, config.yaml, summary-*.json and adapter/, so no run.{hint}"
        )
    for name in ("adapter", "merged", "checkpoints"):
        if (run.folder / name).is_dir():
            run.sizes[name] = sum(p.stat().st_size for p in (run.folder / name).rglob("*") if p.is_file())
    return run


def _curves(path: Path) -> dict[str, Curve]:
    curves: dict[str, Curve] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.DictReader(file), start=2):
            try:
                step = int(row["step"])
                values = {k: float(v) for k, v in row.items() if v and k and k not in ("step", "epoch")}
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {number}: not a line of Lightning's CSVLogger ({error}).") from error
            for name, value in values.items():
                if math.isfinite(value):
                    curves.setdefault(name, []).append((step, value))
    return curves


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}).") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, not an object.")
    return found
