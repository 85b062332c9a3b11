"""How the loss falls with the number of training examples, as ``enough`` measured it.

``python -m experiments enough FOLDER ...`` reads the output folders of ``enough`` and writes ``enough.json``. The commands are
in experiments/README.md.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import table
from experiments.collected import keep
from experiments.statistics import Mean

RECORD = Path(__file__).parent / "enough.json"
_KEPT = ("monitor", "equal", "sizes", "noise", "sentences")


def collect(folders: Sequence[Path]) -> Path:
    """Keep the results of the studies in the output folders of ``enough``, beside those of other names.

    Raises:
        ValueError: A folder has no result, or runs are missing.
    """
    found = {}
    for folder in sorted(folders):
        if not (file := folder / "enough.json").is_file():
            raise ValueError(f"{folder} has no enough.json; give the --output of a study.")
        result = json.loads(file.read_text(encoding="utf-8"))
        if result["missing"] or result["failures"]:
            raise ValueError(f"{folder}: the study has not ended; type its command again.")
        found[folder.name] = {name: result[name] for name in _KEPT}
    return keep(RECORD, found)


def enough_text(record: Mapping[str, Any]) -> str:
    """Scores by the number of examples, a row for each study, and the sentences that ``enough`` printed."""
    sizes = sorted({found["size"] for study in record.values() for found in study["sizes"]})
    rows = []
    for name, study in record.items():
        scores = {found["size"]: Mean(**_mean(found["score"])) for found in study["sizes"]}
        seeds = max((score.n for score in scores.values()), default=0)
        cells = [str(scores[size]) if size in scores else "" for size in sizes]
        rows.append([name, *cells, f"{study['noise']:.3f}" if study["noise"] is not None else "", str(seeds)])
    head = ["examples", *map(str, sizes), "noise of a run", "seeds"]
    said = [f"- {name}: {' '.join(study['sentences'])}" for name, study in record.items()]
    return "\n\n".join([table(head, rows), "\n".join(said)])


def _mean(score: Mapping[str, Any]) -> dict[str, Any]:
    half = math.nan if score["half"] is None else score["half"]
    return {"mean": score["mean"], "half": half, "n": score["count"]}
