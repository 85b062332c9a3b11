"""Runs what studies ask for, several at a time; each finished run is a file, and what is there is never run again."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from experiments.run import Places, run
from experiments.study import Spec, Study, identity
from lightning_pmss.store.disk import atomic_file

RECORDS = Path(__file__).parent / "records"


def read_records(folder: Path = RECORDS) -> dict[str, dict[str, Any]]:
    """All finished runs by name."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.json"))}


def write_record(record: dict[str, Any], folder: Path) -> Path:
    """Write a record whole or not at all."""
    spec = record["spec"]
    path = folder / spec["model"] / f"{identity(spec)}.json"
    with atomic_file(path) as new:
        new.write_text(json.dumps(record) + "\n", encoding="utf-8")
    return path


def _prepare(threads: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(threads)
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


@contextmanager
def _ended(pool: ProcessPoolExecutor) -> Iterator[None]:
    """The pool, whose workers are killed if something ends the driver early: what they were at would be lost anyway."""
    try:
        yield
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.kill()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def drive(
    studies: Sequence[Study], places: Places, *, workers: int, folder: Path = RECORDS, minutes: float | None = None
) -> int:
    """Run until nothing is left, the studies in their order.

    A study whose finished runs have taken its ``budget_minutes`` (of one core) begins no further run.

    Args:
        studies: What to run.
        places: Where models and data are.
        workers: Runs at a time, each with an equal share of torch's threads (OMP_NUM_THREADS lowers their number).
        folder: Of the records.
        minutes: Begin no run after so many.

    Returns:
        How many runs failed. They are tried again when the driver is started again.
    """
    started = time.monotonic()
    records = read_records(folder)
    failed: set[str] = set()
    running: dict[Future[Any], Spec] = {}
    threads = max(1, torch.get_num_threads() // workers)
    pool = ProcessPoolExecutor(
        workers, get_context("spawn"), initializer=_prepare, initargs=(threads,), max_tasks_per_child=40
    )
    # Without this a killed driver leaves its workers behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with _ended(pool), tqdm(desc="runs", unit="run", disable=None) as bar:
        while True:
            late = minutes is not None and time.monotonic() - started > 60 * minutes
            busy = {identity(spec) for spec in running.values()} | failed
            waiting = [] if late else [s for s in _next(studies, records) if identity(s) not in busy]
            for spec in waiting[: workers - len(running)]:
                running[pool.submit(run, spec, places)] = spec
            bar.total = bar.n + len(running) + len(waiting)
            bar.refresh()
            if not running:
                break
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                spec = running.pop(future)
                name = identity(spec)
                try:
                    record = future.result()
                except Exception:
                    failed.add(name)
                    tqdm.write(f"FAILED {name}\n{traceback.format_exc()}")
                else:
                    write_record(record, folder)
                    records[name] = record
                    told = {k: round(v, 4) for k, v in record["scores"].items() if isinstance(v, float)}
                    tqdm.write(f"{record['seconds']:7.1f} s  {name}  {record['status']} {told}")
                bar.update()
    return len(failed)


def spent_minutes(study: Study, records: dict[str, dict[str, Any]]) -> float:
    """Minutes of one core that the finished runs of a study took."""
    names = {
        identity(r["spec"]): r
        for arm in study.arms
        for p in ("sweep", "final")
        for r in study.finished(arm, p, records)
    }
    return sum(record["seconds"] for record in names.values()) / 60


def _next(studies: Sequence[Study], records: dict[str, dict[str, Any]]) -> list[Spec]:
    found: dict[str, Spec] = {}
    for study in studies:
        if spent_minutes(study, records) < study.budget_minutes:
            for spec in study.next_runs(records):
                found.setdefault(identity(spec), spec)
    return list(found.values())
