"""Predictions files, for `compare` and for an evaluation that goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_pmss.cli import main
from lightning_pmss.evaluation.journal import Journal
from lightning_pmss.evaluation.records import append_records, write_records
from tests.fuzz.mutations import copied, mutate
from tests.fuzz.trying import LIMIT, attempt, cases, state

pytestmark = LIMIT

IDENTITY = {"model": "0123456789abcdef", "max_new_tokens": 6}


def rows(run: str, scores: list[float]) -> list[dict[str, Any]]:
    common = {"output": "x", "extracted": "x", "gold": None, "loss": 1.5, "tokens": 3, "prompt_tokens": 4, "group": "a"}
    return [
        {"id": n, "prompt": f"q{n}", "target": ["t", n], **common, "score": score, "score_f1": score / 2, "run": run}
        for n, score in enumerate(scores)
    ]


@pytest.fixture(scope="module")
def predictions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished evaluation and one that was stopped, and files of two models to compare."""
    folder = tmp_path_factory.mktemp("predictions")
    journal = Journal(folder / "stopped", "test", IDENTITY)
    journal.append(rows(journal.run, [1, 0, 1]))
    (folder / "stopped" / "predictions-test.rank1.jsonl").write_text("")
    append_records(rows(journal.run, [0, 0, 0, 1, 1])[3:], folder / "stopped" / "predictions-test.rank1.jsonl")
    journal.close()
    for name, scores in (("a", [1, 0, 1, 1, 0, 0]), ("b", [1, 1, 1, 0, 0, 0])):
        write_records(rows("r", [float(score) for score in scores]), folder / f"{name}.jsonl")
    return folder


def test_compare(predictions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copied(predictions / "b.jsonl", tmp_path / "b.jsonl")
    for seed, random in cases("compare"):
        damaged = copied(predictions / "a.jsonl", tmp_path / "a.jsonl")
        told = f"seed {seed}: {mutate(damaged, random)}"
        before = state(tmp_path)
        options = ["--resamples", "20", *random.choice(([], ["--json"], ["--ignore-prompts"]))]
        files = [str(damaged), str(tmp_path / "b.jsonl")]
        if random.random() < 0.5:
            files.reverse()
        found = attempt(lambda: main(["compare", *files, *options]), told, (SystemExit,))  # noqa: B023
        said = capsys.readouterr()
        assert state(tmp_path) == before, told
        if isinstance(found, SystemExit):
            assert said.err.startswith("python -m lightning_pmss compare: error: "), told
            assert said.err.count("\n") == 1, f"{told}: {said.err}"
        else:
            assert said.out, told


def test_going_on(predictions: Path, tmp_path: Path) -> None:
    """What is taken up is complete and usable; where it is refused nothing has changed."""
    for seed, random in cases("journal"):
        folder = copied(predictions / "stopped", tmp_path / "p")
        told = f"seed {seed}: {mutate(folder, random)}"
        before = state(folder)
        found = attempt(lambda: Journal(folder, "test", IDENTITY), told)  # noqa: B023
        if isinstance(found, Exception):
            assert state(folder) == before, told
            continue
        for row in found.done.values():
            assert isinstance(row["output"], str), told
            assert row["loss"] * row["tokens"] is not None, told
            assert row["run"] == found.run, told
        done = list(found.done.values())
        attempt(lambda: found.finish(done), told, ())  # noqa: B023
        kept = (folder / "predictions-test.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line)["id"] for line in kept] == [row["id"] for row in done], told
        found.close()
