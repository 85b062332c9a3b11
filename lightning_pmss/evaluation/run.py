"""Run an evaluation of texts: reuse stored answers, show the score so far, and write the files at the end."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_pmss.evaluation.answers import examine
from lightning_pmss.evaluation.bootstrap import CONFIDENCE, RESAMPLES, interval_of_mean
from lightning_pmss.evaluation.compare import score_names
from lightning_pmss.evaluation.journal import Journal
from lightning_pmss.evaluation.predictions import gather, gather_predictions, write_predictions
from lightning_pmss.evaluation.records import write_json


class TextEvaluation:
    """Collector of the answers of one evaluation on this rank.

    Args:
        metric: Metric that scores texts, see `CausalLMModule`; or None.
        journal: Storage of answers while the evaluation runs; None writes answers only at the end.
    """

    def __init__(self, metric: Any, journal: Journal | None = None) -> None:
        self.metric, self.journal = metric, journal
        self.rows: list[dict[str, Any]] = []
        self.resumed = 0
        self.started = time.perf_counter()

    def split(self, batch: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[int]]:
        """Add the stored answers of a batch to the evaluation, and list the examples that are not answered yet.

        Args:
            batch: With ``id``, ``prompt``, ``target`` and ``prompt_mask``.

        Returns:
            The stored rows of this batch, and the places of the examples that are not answered yet. Fillers, which have a
            negative id, are in neither.

        Raises:
            ValueError: A stored answer belongs to another question with the same id.
        """
        stored, missing = [], []
        for place, number in enumerate(batch["id"].tolist()):
            if number < 0:
                continue
            row = None if self.journal is None else self.journal.done.get(number)
            if row is not None:
                now = json.loads(json.dumps(question(batch, place)))
                if other := [key for key in now if row.get(key) != now[key]]:
                    assert self.journal is not None
                    raise ValueError(
                        f"{self.journal.path.parent} contains an answer of this model to another question with the id "
                        f"{number} (other {', '.join(other)}): the data or the prompt style have changed. Give "
                        "--model.predictions_dir another folder, or --model.existing_predictions replace."
                    )
            if row is None:
                missing.append(place)
            else:
                # Scored again, because the metric may have changed.
                kept = {key: value for key, value in row.items() if key != "run" and not key.startswith("score")}
                normalised = {k: row[k] for k in ("score_normalised",) if k in row}
                stored.append({**kept, **examine(self.metric, row["output"], row["target"]), **normalised})
        self.rows += stored
        self.resumed += len(stored)
        return stored, missing

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Add new answers; a journal writes them to the disk at once."""
        self.rows += rows
        if self.journal is not None:
            self.journal.append(rows)

    def show(self, trainer: L.Trainer) -> None:
        """Show this rank's score so far in the progress bar."""
        scores = [row["score"] for row in self.rows if row.get("score") is not None]
        shown: Any = trainer.progress_bar_callback
        if not scores or not trainer.testing or shown is None or not shown.is_enabled:
            return
        text = f"score {sum(scores) / len(scores):.3f} of {len(scores)}"
        if isinstance(shown, TQDMProgressBar):
            shown.test_progress_bar.set_postfix_str(text)
        elif isinstance(shown, RichProgressBar) and shown.progress and shown.test_progress_bar_id is not None:
            shown.progress.update(shown.test_progress_bar_id, description=f"Testing, {text}")

    def finish(self, folder: Path | None, stage: str, *, first: bool) -> dict[str, Tensor]:
        """Gather the answers of all ranks, write them, and score them; call it on every rank.

        Args:
            folder: Folder of the files; None writes no files.
            stage: Part of the files' names.
            first: Whether this is rank 0.

        Returns:
            The metric's values over all answers, equal on every rank; empty without a metric or an answer.
        """
        try:
            return self._finish(folder, stage, first)
        finally:
            if self.journal is not None:
                self.journal.close()

    def _finish(self, folder: Path | None, stage: str, first: bool) -> dict[str, Tensor]:
        rows: Any = gather_predictions(self.rows)  # type: ignore[arg-type]
        resumed = sum(gather(self.resumed))
        if not rows:
            return {}
        if self.journal is not None:
            self.journal.finish(rows)
        elif first and folder is not None:
            write_predictions(rows, folder / f"predictions-{stage}.jsonl")
        values = {} if stage == "predict" else self._compute(rows)
        if self.journal is not None and first:
            assert folder is not None
            seconds = time.perf_counter() - self.started
            about: dict[str, Any] = {"stage": stage, "run": self.journal.run, "identity": self.journal.identity}
            about |= {"logged": {key: float(value) for key, value in values.items()}}
            about |= {"seconds": round(seconds, 3), "answered_before": resumed}
            found = summary(rows)
            write_json(about | found, folder / f"summary-{stage}.json")
            for name, part in found["scores"].items():
                interval = f"{part['mean']:.4f} [{part['low']:.4f}, {part['high']:.4f}]"
                rank_zero_info(f"{name}: {interval} ({CONFIDENCE:.0%} interval, {part['n']} examples)")
            rank_zero_info(f"Predictions, scores and intervals are in {folder}.")
        return values

    def _compute(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        if self.metric is None:
            return {}
        # Outside of inference mode, because a later evaluation could not update inference tensors.
        with torch.inference_mode(False):
            self.metric.update([row["output"] for row in rows], [row["target"] for row in rows])
            scores = self.metric.compute()
            self.metric.reset()
        values = dict(scores) if isinstance(scores, dict) else {"exact_match": scores}
        if all("score_normalised" in row for row in rows):
            mean = sum(row["score_normalised"] for row in rows) / len(rows)
            values["exact_match_normalised"] = torch.tensor(mean, dtype=torch.float32)
        return values


def question(batch: Mapping[str, Any], place: int) -> dict[str, Any]:
    """Return the fields that identify a question: prompt, target, prompt length."""
    return {
        "prompt": batch["prompt"][place],
        "target": batch["target"][place],
        "prompt_tokens": int(batch["prompt_mask"][place].sum()),
    }


def select(batch: dict[str, Any], places: Sequence[int]) -> dict[str, Any]:
    """Select examples of a batch by their places."""
    if len(places) == len(batch["id"]):
        return batch
    return {
        key: value[list(places)] if isinstance(value, Tensor) else [value[place] for place in places]
        for key, value in batch.items()
    }


def summary(rows: Sequence[Mapping[str, Any]], *, seed: int = 0) -> dict[str, Any]:
    """Compute each score with its interval, over all rows and per group.

    Each resample draws the same rows for all scores, so intervals of several scores are paired.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if "group" in row:
            groups.setdefault(row["group"], []).append(row)
    return {
        "n": len(rows),
        "bootstrap": {"resamples": RESAMPLES, "confidence": CONFIDENCE, "seed": seed},
        "scores": _intervals(rows, seed),
        **({"groups": {name: _intervals(part, seed) for name, part in groups.items()}} if groups else {}),
    }


def _intervals(rows: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    found = {}
    for name in dict.fromkeys(name for row in rows for name in score_names(row)):
        values = [row[name] for row in rows if row.get(name) is not None]
        found[name] = interval_of_mean(values, seed=seed).to_dict()
    return found
