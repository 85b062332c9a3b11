"""Predictions files that `test` did not write like this: each is refused in one sentence that names file and line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from lightning_pmss.evaluation import compare_files
from lightning_pmss.evaluation.records import append_records, read_records, write_json, write_records

ROW: dict[str, Any] = {"id": 0, "prompt": "p", "output": "x", "target": "t", "score": 1.0}


def line(**changes: Any) -> str:
    return json.dumps(ROW | changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (line(id=[1]), r"line 2 is damaged.*`id` .*not \[1\]"),
        (line(id=None), "line 2 is damaged.*`id`"),
        (line(id=True), "line 2 is damaged.*`id`"),
        (line(id=0.5), "line 2 is damaged.*`id`"),
        (line(prompt=3), "line 2 is damaged.*`prompt` should be a valid string, not 3"),
        (line(output=["x"]), "line 2 is damaged.*`output`"),
        (line(group={}), "line 2 is damaged.*`group`"),
        (line(run=[]), "line 2 is damaged.*`run`"),
        (line(score="high"), "line 2: `score` is no finite number, but 'high'"),
        (line(score=[1]), "line 2: `score` is no finite number, but list"),
        (line(score=float("nan")), "line 2: `score` is no finite number, but nan"),
        (line(score_f1=float("inf")), "line 2: `score_f1` is no finite number, but inf"),
        (line(score_f1=10**400), "line 2: `score_f1` is no finite number, but 1000"),
        (line().replace("1.0", "9" * 5000), r"line 2 is not JSON \(Exceeds the limit"),
        ("[" * 5000, r"line 2 is not JSON \(it is nested too deeply\)"),
        ('{"id": 0, "id": 1, "prompt": "p", "output": "x"}', r"line 2 is not JSON \(the key 'id' is there twice\)"),
        ("\xff", r"line 2 is not JSON \(byte 0 is not UTF-8\)"),
        ("\x00", "line 2 is not JSON"),
        ("", r"line 2 is not JSON \(it is empty\)"),
        (line(**{"score_\n\x1b[31m": "x"}), r"line 2: `score_\\n\\x1b\[31m` is no finite number"),
    ],
)
def test_lines_of_wrong_types(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(f"{line(id=7)}\n{text}\n".encode("latin-1"))
    with pytest.raises(ValueError, match=f"p.jsonl {message}") as caught:
        read_records(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=message):
        compare_files(path, path)


def test_losses_of_a_diverged_model_are_read_and_carriage_returns_too(tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(f"{line(loss=float('nan'), likelihoods={'a': float('-inf')})}\r\n".encode())
    (row,) = read_records(tmp_path / "p")
    assert row["loss"] != row["loss"]
    assert row["score"] == 1


def test_a_byte_order_mark_is_named(tmp_path: Path) -> None:
    (tmp_path / "p").write_text(f"{line()}\n", encoding="utf-8-sig")
    with pytest.raises(ValueError, match=r"line 1 is not JSON \(it begins with a byte order mark"):
        read_records(tmp_path / "p")


def test_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "circle").symlink_to("circle")
    for name, error, message in (
        ("folder", ValueError, "is a folder"),
        ("pipe", ValueError, "is a pipe or a device"),
        ("circle", OSError, "circle"),
        ("none", FileNotFoundError, "There is no file"),
    ):
        with pytest.raises(error, match=message):
            read_records(tmp_path / name)


def test_ids_of_other_programs_may_be_texts(tmp_path: Path) -> None:
    rows = [{**ROW, "id": number, "score": score} for number, score in (("b", 1), (3, 0), ("a", 1), (1, 0))]
    write_records(rows, tmp_path / "a")
    write_records(reversed(rows), tmp_path / "b")
    assert compare_files(tmp_path / "a", tmp_path / "b").counts["both"] == 2
    write_records(rows[1:], tmp_path / "c")
    with pytest.raises(ValueError, match=r"c lacks 1 of the examples in .*a \(ids b\)"):
        compare_files(tmp_path / "a", tmp_path / "c")


def test_links_are_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "thesis").write_text("mine\n")
    for name in ("appended", "records", "json"):
        (tmp_path / name).symlink_to(tmp_path / "thesis")
    with pytest.raises(OSError, match="symbolic link"):
        append_records([ROW], tmp_path / "appended")
    write_records([ROW], tmp_path / "records")
    write_json({}, tmp_path / "json")
    assert (tmp_path / "thesis").read_text() == "mine\n"
    assert read_records(tmp_path / "records") == [ROW]
