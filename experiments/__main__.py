"""``python -m experiments``: run the studies, measure what belongs to no study, and make the page of all of them."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from experiments.driver import RECORDS, drive, read_records, spent_minutes
from experiments.run import Places
from experiments.study import read_study

STUDIES = Path(__file__).parent / "studies"


def main() -> int:
    """Parse the command line and do it."""
    parser = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    runs = verbs.add_parser("run", help="run what is missing; stop it and start it again at will")
    status = verbs.add_parser("status", help="what is finished and what is missing")
    gradients = verbs.add_parser("gradients", help="how much of GSM8K's gradients the skeletons of SmolLM2 hold")
    floor = verbs.add_parser("floor", help="the lowest loss on pairs that the frozen head of stories260K allows")
    combined = verbs.add_parser("combined", help="adapters of three tasks, combined by each rule, tested on all three")
    searches = verbs.add_parser("searches", help="early against final scores of searches by tune")
    searches.add_argument("folders", nargs="+", type=Path, help="each an --output of tune, named like its study")
    enough = verbs.add_parser("enough", help="the loss by the number of training examples")
    enough.add_argument("folders", nargs="+", type=Path, help="each an --output of enough")
    page = verbs.add_parser("page", help="tables and plots of the records for docs/evidence.md")
    for verb in (runs, status):
        verb.add_argument("studies", nargs="*", type=Path, help="all of experiments/studies if none is given")
    for verb in (runs, status, page):
        verb.add_argument("--records", type=Path, default=RECORDS)
    for verb in (runs, gradients, floor, combined):
        verb.add_argument("--models", nargs="+", default=["models"], help="folders that models lie in")
        if verb is not floor:
            verb.add_argument("--data", required=True, help="folder with gsm8k, commonsense and drop")
        verb.add_argument("--cache", default="runs/experiments/cache", help="for tokenised data")
    combined.add_argument("--work", type=Path, default=Path("runs/experiments/combined"), help="for the adapters")
    runs.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    runs.add_argument("--workers", type=int, help="runs at a time; a core each on the CPU, one on a GPU if not given")
    runs.add_argument("--minutes", type=float, help="begin no run after so many minutes")
    page.add_argument("--output", type=Path, default=Path("docs"))
    given = parser.parse_args()
    if given.verb == "page":
        from experiments.page import write_page

        print(write_page(read_records(given.records), given.output))
        return 0
    if given.verb in ("searches", "enough"):
        from experiments import enough as sizes
        from experiments import searches as tuned

        print((tuned if given.verb == "searches" else sizes).collect(given.folders))
        return 0
    if given.verb == "combined":
        from experiments.combined import measure

        measure(Places(tuple(given.models), given.data, given.cache), given.work)
        return 0
    if given.verb in ("gradients", "floor"):
        from experiments import floor as floors
        from experiments import gradients as shares

        write = shares.write if given.verb == "gradients" else floors.write
        print(write(Places(tuple(given.models), getattr(given, "data", ""), given.cache)))
        return 0
    studies = [read_study(path) for path in given.studies or sorted(STUDIES.glob("*.yaml"))]
    if given.verb == "status":
        records = read_records(given.records)
        for study in studies:
            left, minutes = len(study.next_runs(records)), spent_minutes(study, records)
            print(f"{study.name}: {left} runs can begin now; {minutes:.0f} of {study.budget_minutes:.0f} minutes spent")
        return 0
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    places = Places(tuple(given.models), given.data, given.cache, given.device)
    for study in studies:
        places.model(study.common["model"])
    workers = given.workers or (1 if given.device == "cuda" else os.cpu_count() or 1)
    return 1 if drive(studies, places, workers=workers, folder=given.records, minutes=given.minutes) else 0


if __name__ == "__main__":
    sys.exit(main())
