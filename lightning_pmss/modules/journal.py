"""The state of an evaluation on disk: what is answered already, so that a stopped `test` goes on where it was.

Each rank appends what it has answered, batch by batch, to ``predictions-<stage>.rank<r>.jsonl``; at the end rank 0 writes
all of it to ``predictions-<stage>.jsonl`` and the parts are removed. Each line carries the hash of the run it belongs to
(``run``); ``predictions-<stage>.runs.json`` says what is behind a hash.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist

from lightning_pmss.evaluation.records import append_records, read_records, write_json, write_records
from lightning_pmss.modules.identity import differences, digest
from lightning_pmss.modules.predictions import gather

Existing = Literal["resume", "replace"]


class Journal:
    """Predictions of one evaluation.

    Args:
        folder: Where the files are.
        stage: Part of their names.
        identity: What decides the answers, in plain values.
        existing: "resume" takes over what the same run has answered, and refuses predictions of another one; "replace"
            begins anew.

    Raises:
        ValueError: On every rank, if predictions of another run are there and ``existing`` is "resume", or a file is broken.
    """

    def __init__(self, folder: Path, stage: str, identity: Mapping[str, Any], existing: Existing = "resume") -> None:
        self.folder, self.stage, self.identity = folder, stage, dict(identity)
        self.run = digest(self.identity)
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        self.path = folder / f"predictions-{stage}.jsonl"
        self._own = folder / f"predictions-{stage}.rank{rank}.jsonl"
        self._runs = folder / f"predictions-{stage}.runs.json"
        self.first = rank == 0
        self._told = False
        self.done: dict[int, dict[str, Any]] = {}
        """Answers of the same run that were there at the start, by id."""
        problem = None
        try:
            self._read(existing)
        except (OSError, ValueError) as error:
            problem = str(error)
        problems: list[Any] = gather(problem)  # also the barrier: nobody writes before all have read
        if any(problems):
            raise ValueError(next(text for text in problems if text))
        for rows in gather(list(self.done.values())):
            self.done.update((row["id"], row) for row in rows)
        self._begin(existing)

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob(f"predictions-{self.stage}.rank*.jsonl"))

    def _read(self, existing: Existing) -> None:
        if existing == "replace":
            return
        for path in [self.path, *self._parts()]:
            if not path.is_file():
                continue
            rows = read_records(path, unfinished=path != self.path)
            foreign = next((row for row in rows if row.get("run") != self.run), None)
            if foreign is not None:
                known = self._known().get(foreign.get("run"))
                told = f" ({differences(self.identity, known)})" if known else ""
                raise ValueError(
                    f"{path} holds predictions of another run{told}. Give --model.predictions_dir another folder, or "
                    "--model.existing_predictions replace to begin anew there."
                )
            self.done.update((row["id"], row) for row in rows)

    def _known(self) -> dict[Any, Any]:
        try:
            known = json.loads(self._runs.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # it only explains
            return {}
        return known if isinstance(known, dict) else {}

    def _begin(self, existing: Existing) -> None:
        """Rank 0's part takes over all that is to be kept; then the others go. A kill in between loses nothing."""
        if self.first:
            if self.done:
                write_records([self.done[number] for number in sorted(self.done)], self._own)
            for path in self._parts():
                if path != self._own or not self.done:
                    path.unlink(missing_ok=True)
            if existing == "replace":
                self.path.unlink(missing_ok=True)
        else:
            self._own.unlink(missing_ok=True)  # on a node with a disk of its own
        barrier()

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Put answers on the disk."""
        if not rows:
            return
        if self.first and not self._told:
            write_json({self.run: self.identity}, self._runs)
            self._told = True
        append_records([{**row, "run": self.run} for row in rows], self._own)

    def finish(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the whole file (rank 0 does) and remove the parts.

        Args:
            rows: The answers of all ranks. Earlier answers of the same run to other questions (a ``test_limit`` was larger)
                stay in a part, where a later run finds them.
        """
        asked = {row["id"] for row in rows}
        others = [row for number, row in sorted(self.done.items()) if number not in asked]
        if self.first:
            write_records(({**row, "run": self.run} for row in rows), self.path)
            write_json({self.run: self.identity}, self._runs)
        barrier()
        self._own.unlink(missing_ok=True)
        if self.first and others:
            write_records(others, self._own)


def barrier() -> None:
    """Wait for all ranks, where there are several."""
    gather(None)
