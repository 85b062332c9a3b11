"""`test` killed at any moment: no answer is lost, earlier predictions stay, and the same command finishes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from handmade import EqualTexts, HandMade

from lightning_pmss.evaluation.records import read_records
from lightning_pmss.modules import CausalLMModule
from tests.killing import KILLS, LIMIT, Moment, forks, moments, run

pytestmark = LIMIT

FINISHED = ["predictions-test.jsonl", "predictions-test.runs.json", "summary-test.json"]


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _answers(folder: Path) -> list[dict[str, Any]]:
    rows = read_records(folder / "predictions-test.jsonl")
    return [{**row, "loss": pytest.approx(row["loss"], rel=1e-5)} for row in rows]


def _on_disk(folder: Path, run_of: str) -> set[int]:
    """Ids of this run's answers in any file: complete lines alone."""
    rows = []
    for path in folder.glob("predictions-test*.jsonl"):
        rows += [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    return {row["id"] for row in rows if row["run"] == run_of}


@forks
@pytest.mark.parametrize("existing", ["resume", "replace"])
def test_killed_evaluation(tiny_llama: str, tmp_path: Path, trainer: Callable[..., Any], existing: str) -> None:
    data, folder, log = HandMade(tiny_llama), tmp_path / "p", tmp_path / "log"
    earlier = tmp_path / "earlier"

    def work(place: Path = folder, tokens: int = 6) -> None:
        options: dict[str, Any] = {"max_new_tokens": tokens, "existing_predictions": existing}
        module = CausalLMModule(tiny_llama, metric=EqualTexts(), predictions_dir=str(place), **options)
        trainer().test(module, data, verbose=False)

    def prepare() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(earlier, folder)

    earlier.mkdir()
    if existing == "replace":  # another run's
        work(earlier, 3)
    kept = {path.name: path.read_bytes() for path in earlier.iterdir()}
    prepare()
    ending = run(work, folder, log)
    assert ending.status == 0, ending.output
    whole, told = _answers(folder), json.loads((folder / "summary-test.json").read_text())
    assert [row["id"] for row in whole] == [0, 1, 2, 3, 4]
    for moment in [*moments(ending.changes, 3, -(-KILLS // 2)), Moment(ending.changes)]:
        prepare()
        what = f"{moment} of {ending.changes}"
        assert run(work, folder, log, moment).status in (-9, 0), what
        done = _on_disk(folder, told["run"])
        if existing == "replace" and done != {0, 1, 2, 3, 4}:
            name = "predictions-test.jsonl"
            found = [folder / name, folder / "predictions-test.replaced.jsonl"]
            assert kept[name] in [path.read_bytes() for path in found if path.exists()], what
        again = run(work, folder, log)
        assert again.status == 0, f"{what}: {again.output}"
        assert _names(folder) == FINISHED, what
        assert read_records(folder / "predictions-test.jsonl") == whole, what
        found_told = json.loads((folder / "summary-test.json").read_text())
        assert found_told["scores"] == told["scores"], what
        assert found_told["answered_before"] == (len(done) if existing == "resume" else 0), what
