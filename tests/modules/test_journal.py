"""The files of an evaluation: one evaluation at a time in a folder, and nothing lost that was there."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from lightning_pmss.evaluation.journal import Journal
from lightning_pmss.evaluation.records import read_records, write_records
from lightning_pmss.store.disk import LOCK, held

ONE, OTHER = {"model": "one"}, {"model": "other"}


def rows(*ids: int, **changes: Any) -> list[dict[str, Any]]:
    common = {"output": "x", "target": "t", "prompt_tokens": 2, "loss": 0.5, "tokens": 3, "score": 1.0}
    return [{"id": number, "prompt": f"q{number}", **common, **changes} for number in ids]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != LOCK)


@pytest.fixture
def journal(tmp_path: Path) -> Any:
    """Makes journals in one folder, and closes them."""
    made: list[Journal] = []

    def make(identity: dict[str, str] = ONE, **options: Any) -> Journal:
        made.append(Journal(tmp_path / "p", "test", identity, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_a_second_evaluation_in_the_folder_is_refused_by_name(journal: Any, tmp_path: Path) -> None:
    first = journal()
    first.append(rows(0, 1))
    before = names(tmp_path / "p")
    place = tmp_path / "p"
    with (
        pytest.raises(
            FileExistsError, match=r"another evaluation is writing into .*/p\. Wait for it, or give --model\.pred"
        ),
        held(
            place, f"another evaluation is writing into {place}. Wait for it, or give --model.predictions_dir another"
        ),
    ):
        pass
    first.finish(rows(0, 1))
    first.close()
    with held(place, "never"), pytest.raises(FileExistsError, match=r"another evaluation is writing into .*/p\. Wait"):
        journal()
    assert set(before) - {"predictions-test.rank0.jsonl"} <= set(names(place))
    journal()


def test_an_evaluation_that_was_stopped_in_this_process_holds_nothing(journal: Any, tmp_path: Path) -> None:
    """A notebook: Ctrl-C, and the cell again, with the old module still alive."""
    first = journal()
    first.append(rows(0))
    second = journal()
    assert list(second.done) == [0]
    second.append(rows(1))
    second.finish(rows(0, 1))
    assert names(tmp_path / "p") == ["predictions-test.jsonl", "predictions-test.runs.json"]


@pytest.mark.parametrize("place", ["predictions-test.jsonl", "predictions-test.rank0.jsonl", "summary-test.json"])
def test_a_folder_in_the_place_of_a_file_is_refused_before_anything_is_answered(
    journal: Any, tmp_path: Path, place: str
) -> None:
    (tmp_path / "p" / place / "thesis").mkdir(parents=True)
    for existing in ("resume", "replace"):
        with pytest.raises(IsADirectoryError, match=f"{place} is a folder"):
            journal(existing=existing)
    assert (tmp_path / "p" / place / "thesis").is_dir()


def test_replacing_keeps_the_earlier_predictions_until_it_has_finished(journal: Any, tmp_path: Path) -> None:
    first = journal(OTHER)
    first.finish(rows(0, 1, output="earlier"))
    first.close()
    kept = (tmp_path / "p" / "predictions-test.jsonl").read_bytes()
    second = journal(existing="replace")
    second.append(rows(0))
    assert (tmp_path / "p" / "predictions-test.replaced.jsonl").read_bytes() == kept
    second.close()  # killed
    third = journal()  # goes on with what the second has answered
    assert list(third.done) == [0]
    third.finish(rows(0, 1))
    assert names(tmp_path / "p") == ["predictions-test.jsonl", "predictions-test.runs.json"]
    assert {row["output"] for row in read_records(tmp_path / "p" / "predictions-test.jsonl")} == {"x"}


@pytest.mark.parametrize("existing", ["resume", "replace"])
def test_only_parts_of_ranks_are_removed(journal: Any, tmp_path: Path, existing: str) -> None:
    (tmp_path / "p").mkdir()
    foreign = ["predictions-test.rankthesis.jsonl", "predictions-test.rank1.jsonl.bak", "predictions-test.rank.jsonl"]
    for name in foreign:
        (tmp_path / "p" / name).write_text("mine")
    journal(existing=existing).finish(rows(0))
    assert names(tmp_path / "p") == sorted([*foreign, "predictions-test.jsonl", "predictions-test.runs.json"])


def test_a_part_that_is_a_link_is_read_and_not_written_through(journal: Any, tmp_path: Path) -> None:
    first = journal()
    first.append(rows(0))
    first.close()
    part, elsewhere = tmp_path / "p" / "predictions-test.rank0.jsonl", tmp_path / "elsewhere"
    shutil.move(part, elsewhere)
    part.symlink_to(elsewhere)
    before = elsewhere.read_bytes()
    second = journal()
    assert list(second.done) == [0]
    second.append(rows(1))
    second.finish(rows(0, 1))
    assert elsewhere.read_bytes() == before
    assert not os.path.lexists(part)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": None}, "line 1 is damaged.*`loss`"),
        ({"loss": "x"}, "line 1 is damaged.*`loss`"),
        ({"tokens": -1}, "line 1 is damaged.*`tokens`"),
        ({"tokens": 10**30, "loss": []}, "line 1 is damaged.*`loss`"),
        ({"id": "0"}, "line 1 is damaged.*`id`"),
        ({"score_normalised": "x"}, "line 1: `score_normalised` is no finite number"),
    ],
)
def test_answers_that_cannot_be_taken_up_are_refused_at_the_start(
    journal: Any, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    run = journal().run
    part = tmp_path / "p" / "predictions-test.rank0.jsonl"
    write_records(rows(0, run=run, **change), part)
    before = part.read_bytes()
    with pytest.raises(ValueError, match=message):
        journal()
    assert part.read_bytes() == before


@pytest.mark.parametrize("text", ["[]", "[" * 5000, '{"x": 1}', "\xff"])
def test_a_damaged_list_of_runs_only_shortens_the_explanation(journal: Any, tmp_path: Path, text: str) -> None:
    first = journal()
    first.append(rows(0))
    (tmp_path / "p" / "predictions-test.runs.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"contains predictions of another run\. Give --model\.predictions_dir"):
        journal(OTHER)
    (tmp_path / "p" / "predictions-test.runs.json").write_text(json.dumps({first.run: ["x"]}))
    with pytest.raises(ValueError, match=r"contains predictions of another run\. Give"):
        journal(OTHER)
