"""Whether scores at 20 % of the training name the winners, and whether a Bayesian search finds better ones than chance.

``python -m experiments searches FOLDER ...`` reads the output folders of ``tune`` and writes ``searches.json``. The
commands are in experiments/README.md.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import table
from experiments.statistics import mean

RECORD = Path(__file__).parent / "searches.json"
AFTER = (5, 10, 20, 40)  # trials
_MODE = "min"  # of val/loss


def collect(folders: Sequence[Path]) -> Path:
    """Write the trials of the studies in the output folders of ``tune``.

    Raises:
        ValueError: A folder has no study, or its search has not ended.
    """
    from lightning_pmss.search.records import lines
    from lightning_pmss.search.search import finals_name
    from lightning_pmss.search.storage import BOUND, load_study, open_storage

    found = {}
    for folder in sorted(folders):
        if not (file := folder / "study.db").is_file():
            raise ValueError(f"{folder} has no study.db; give the --output of a search.")
        storage = open_storage(f"sqlite:///{file.absolute()}")
        study = load_study(storage, folder.name)
        bound = study.user_attrs[BOUND]
        trials = lines(study, load_study(storage, finals_name(folder.name)), whole=False)
        if unfinished := [line.number for line in trials if line.state in ("running", "waiting")]:
            raise ValueError(f"{folder}: the trials {unfinished} have not ended; type its command again.")
        kept = ("early", "final", "state", "final_state", "method")
        found[folder.name] = {
            "sampler": bound["sampler"],
            "seed": bound["seed"],
            "trials": [{name: getattr(line, name) for name in kept} for line in trials],
        }
    RECORD.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return RECORD


def searches_text(record: Mapping[str, Any]) -> str:
    """The tables of `agreement_table` and `best_table`."""
    return "\n\n".join([agreement_table(record), best_table(record)])


def agreement_table(record: Mapping[str, Any]) -> str:
    """Early against final scores of the searches whose trials were all trained to their end."""
    rows = []
    for name, study in record.items():
        trials = _lines(study)
        if not all(line.final_state for line in trials if line.early is not None):
            continue
        rows.append([name, *_agreement(trials)])
    head = [
        "search",
        "trials",
        "diverged",
        "Spearman",
        "Kendall",
        "of the 5 best early ones stay",
        "best early one ends as",
    ]
    return table(head, rows) if rows else ""


def best_table(record: Mapping[str, Any]) -> str:
    """The best early score after n trials, and the best final one of the five best early ones; means over the seeds."""
    samplers = dict.fromkeys(study["sampler"] for study in record.values())
    rows = []
    for sampler in samplers:
        studies = [study for study in record.values() if study["sampler"] == sampler]
        cells = [str(mean([best_after(study["trials"], n) for study in studies])) for n in AFTER]
        rows.append([sampler, *cells, str(mean([_finished(study) for study in studies])), str(len(studies))])
    return table(["sampler", *(f"best of {n} trials, early" for n in AFTER), "the best at the end", "seeds"], rows)


def best_after(trials: Sequence[Mapping[str, Any]], n: int) -> float:
    """Least early score of the first n trials."""
    return min((trial["early"] for trial in trials[:n] if trial["early"] is not None), default=math.nan)


def _finished(study: Mapping[str, Any]) -> float:
    """Least final score of the five trials with the least early ones: what a search that finishes five returns."""
    scored = sorted((t for t in study["trials"] if t["early"] is not None), key=lambda trial: trial["early"])
    return min((t["final"] for t in scored[:5] if t["final"] is not None), default=math.nan)


def _agreement(trials: Sequence[Any]) -> list[str]:
    from lightning_pmss.search.ranks import TOP, ranks
    from lightning_pmss.search.records import best_first

    found = ranks(trials, _MODE)
    first = best_first(trials, _MODE)[0].number
    ordered = [line.number for line in best_first(trials, _MODE, final=True)]
    place = f"number {ordered.index(first) + 1}" if first in ordered else "diverged"
    diverged = sum("diverged" in (line.state, line.final_state) for line in trials)
    shown = [f"{value:.2f}" if value is not None else "" for value in (found.spearman, found.kendall)]
    return [str(len(trials)), str(diverged), *shown, f"{found.stayed} of {TOP}", place]


def _lines(study: Mapping[str, Any]) -> list[Any]:
    from lightning_pmss.search.records import Line

    made = []
    for number, trial in enumerate(study["trials"]):
        kept = {name: trial[name] for name in ("early", "final", "state", "final_state")}
        made.append(Line(number=number, seconds=None, params={}, folder="", message="", where="", **kept))
    return made
