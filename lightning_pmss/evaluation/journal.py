"""Store the answers of an evaluation on disk, so that a stopped `test` can resume.

Each rank appends its answers, batch by batch, to ``predictions-<stage>.rank<r>.jsonl``. At the end rank 0 writes all of them to
``predictions-<stage>.jsonl``, and the parts are removed. Each line has the hash of its run (``run``);
``predictions-<stage>.runs.json`` maps hashes to the options of the run.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist

from lightning_pmss.evaluation.identity import differences, digest
from lightning_pmss.evaluation.predictions import gather
from lightning_pmss.evaluation.records import (
    AnswerRecord,
    PredictionRecord,
    append_records,
    read_records,
    write_json,
    write_records,
)
from lightning_pmss.store import read_json
from lightning_pmss.store.disk import held, refuse_special

Existing = Literal["resume", "replace"]


_HELD: dict[Path, ExitStack] = {}  # folders in which this process evaluates


class Journal:
    """Predictions of one evaluation; its folder is locked until `close`.

    Args:
        folder: Folder of the files.
        stage: Part of the files' names.
        identity: Everything that determines the answers, in plain values.
        existing: "resume" uses the answers of the same run, and refuses predictions of another one; "replace" starts again,
            and keeps the earlier predictions until it has finished.
        elsewhere: What to give to write into another folder, for messages.
        anew: What to give for "replace", for messages.
        kind: Required fields of an answer.

    Raises:
        FileExistsError: On every rank, if another evaluation uses the folder.
        ValueError: On every rank, if the folder has predictions of another run and ``existing`` is "resume", or a broken file.
    """

    def __init__(
        self,
        folder: Path,
        stage: str,
        identity: Mapping[str, Any],
        existing: Existing = "resume",
        *,
        elsewhere: str = "--model.predictions_dir another folder",
        anew: str = "--model.existing_predictions replace",
        kind: type[PredictionRecord] = AnswerRecord,
    ) -> None:
        self.folder, self.stage, self.identity = folder, stage, dict(identity)
        self._elsewhere, self._anew, self._kind = elsewhere, anew, kind
        self.run = digest(self.identity)
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        self.path = folder / f"predictions-{stage}.jsonl"
        self._own = folder / f"predictions-{stage}.rank{rank}.jsonl"
        self._runs = folder / f"predictions-{stage}.runs.json"
        self._replaced = folder / f"predictions-{stage}.replaced.jsonl"
        self.first = rank == 0
        self._identified = False
        self.done: dict[int, dict[str, Any]] = {}
        """Answers of the same run that existed at the start, by id."""
        problem: Exception | None = None
        try:
            self._hold()
            self._read(existing)
        except (OSError, ValueError) as error:
            problem = error
        problems: list[Any] = gather(problem)  # also a barrier: no rank writes before all have read
        if refused := next((error for error in problems if error is not None), None):
            self.close()
            raise refused
        for rows in gather(list(self.done.values())):
            self.done.update((row["id"], row) for row in rows)
        self._begin(existing)

    def _hold(self) -> None:
        """Lock the folder on rank 0, for all ranks; release the lock of a stopped evaluation of this process."""
        if not self.first:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        place = self.folder.resolve()
        if (stopped := _HELD.pop(place, None)) is not None:
            stopped.close()
        with ExitStack() as stack:
            stack.enter_context(
                held(
                    place,
                    f"another evaluation is writing into {self.folder}. Wait for it, or give {self._elsewhere}.",
                )
            )
            _HELD[place] = stack.pop_all()

    def close(self) -> None:
        """Unlock the folder for other evaluations."""
        if self.first and (mine := _HELD.pop(self.folder.resolve(), None)) is not None:
            mine.close()

    def _parts(self) -> list[Path]:
        name = re.compile(rf"predictions-{re.escape(self.stage)}\.rank\d+\.jsonl")
        return sorted(path for path in self.folder.glob("predictions-*") if name.fullmatch(path.name))

    def _read(self, existing: Existing) -> None:
        summary = self.folder / f"summary-{self.stage}.json"  # written at the end, with the scores
        for path in (self.path, self._own, self._runs, self._replaced, summary, *self._parts()):
            refuse_special(path)
        if existing == "replace":
            return
        for path in [self.path, *self._parts()]:
            if not path.is_file():
                continue
            rows = read_records(path, unfinished=path != self.path)
            foreign = next((row for row in rows if row.get("run") != self.run), None)
            if foreign is not None:
                known = self._known().get(foreign.get("run"))
                differing = f" ({differences(self.identity, known)})" if isinstance(known, dict) else ""
                raise ValueError(
                    f"{path} contains predictions of another run{differing}. Give {self._elsewhere}, or {self._anew} to"
                    " start again there."
                )
            rows = read_records(path, unfinished=path != self.path, kind=self._kind)
            self.done.update((row["id"], row) for row in rows)

    def _known(self) -> dict[Any, Any]:
        try:
            known = read_json(self._runs, "")
        except (OSError, ValueError):  # the file is used only for an error message
            return {}
        return known if isinstance(known, dict) else {}

    def _begin(self, existing: Existing) -> None:
        """Write all kept answers to rank 0's part before the other parts are removed, so that a kill loses nothing."""
        if self.first:
            if existing == "replace" and self.path.exists():
                self.path.replace(self._replaced)
            if self.done:
                write_records([self.done[number] for number in sorted(self.done)], self._own)
        barrier()
        if self.first:
            for path in self._parts():
                if path != self._own or not self.done:
                    path.unlink(missing_ok=True)
        else:
            self._own.unlink(missing_ok=True)  # on a node with its own disk
        barrier()

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append answers to this rank's file."""
        if not rows:
            return
        if self.first and not self._identified:
            write_json({self.run: self.identity}, self._runs)
            self._identified = True
        append_records([{**row, "run": self.run} for row in rows], self._own)

    def finish(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the whole file on rank 0 and remove the parts.

        Args:
            rows: The answers of all ranks. Earlier answers of the same run to other questions (after a larger ``test_limit``)
                stay in a part for a later run.
        """
        asked = {row["id"] for row in rows}
        others = [row for number, row in sorted(self.done.items()) if number not in asked]
        if self.first:
            write_records(({**row, "run": self.run} for row in rows), self.path)
            write_json({self.run: self.identity}, self._runs)
        barrier()
        if self.first and others:
            write_records(others, self._own)
        else:
            self._own.unlink(missing_ok=True)
        if self.first:
            self._replaced.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the files of this evaluation, and its folder if nothing else is in it; for one process."""
        for path in (self.path, self._runs, self._replaced, *self._parts()):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()


def barrier() -> None:
    """Wait for all ranks, if there are several."""
    gather(None)
