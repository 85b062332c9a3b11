"""Whether scores at 20 % of the training name the winners, and whether a Bayesian search finds better ones than chance.

``python -m experiments searches FOLDER ...`` reads the output folders of ``tune`` and writes ``searches.json``. The
commands are in experiments/README.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import table
from experiments.collected import keep
from experiments.statistics import mean

RECORD = Path(__file__).parent / "searches.json"
AFTER = (5, 10, 20, 40)  # trials
_MODE = "min"  # of val/loss


def collect(folders: Sequence[Path]) -> Path:
    """Keep the trials of the studies in the output folders of ``tune``, beside those of other names.

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
    return keep(RECORD, found)


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
    """The best early score after n trials, and the best final one of the five best early ones.

    Means over the seeds, and their differences, paired by seed. What is searched is the name of a study, without sampler
    and seed: ``pairs`` of ``pairs-tpe-0``.
    """
    found: dict[tuple[str, str], dict[int, list[float]]] = {}
    for name, study in record.items():
        found.setdefault((name.rsplit("-", 2)[0], study["sampler"]), {})[study["seed"]] = _bests(study)
    rows = [[*of, *_cells(list(seeds.values())), str(len(seeds))] for of, seeds in found.items()]
    for (what, sampler), seeds in found.items():
        other = found.get((what, "random"), {})
        both = sorted(seeds.keys() & other.keys())
        if sampler != "random" and len(both) > 1:
            lessened = [[a - b for a, b in zip(seeds[s], other[s], strict=True)] for s in both]
            rows.append([what, f"{sampler} - random", *_cells(lessened), str(len(both))])
    return table(
        ["data", "sampler", *(f"best of {n} trials, early" for n in AFTER), "the best at the end", "seeds"], rows
    )


def _bests(study: Mapping[str, Any]) -> list[float]:
    """A search's cells of the table; NaN where it has fewer trials."""
    trials = study["trials"]
    early = [best_after(trials, n) if n <= len(trials) else math.nan for n in AFTER]
    return [*early, _finished(study)]


def _cells(searches: Sequence[Sequence[float]]) -> list[str]:
    return ["" if any(map(math.isnan, values)) else str(mean(values)) for values in zip(*searches, strict=True)]


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
