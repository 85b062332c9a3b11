"""`compare`: numbers by hand, refusals, and the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_pmss.cli import main
from lightning_pmss.evaluation import compare_files, write_records
from lightning_pmss.evaluation.records import append_records, read_records


def write(path: Path, scores: list[float], **changes: Any) -> Path:
    rows = [
        {"id": n, "prompt": f"q{n}", "output": "x", "target": f"t{n}", "score": score, "score_f1": score / 2, **changes}
        for n, score in enumerate(scores)
    ]
    write_records(rows, path)
    return path


A = [1, 1, 0, 0, 1, 0, 0, 0, 0, 0] * 4
B = [1, 0, 1, 1, 1, 1, 0, 0, 0, 1] * 4


def test_counts_difference_and_p(tmp_path: Path) -> None:
    found = compare_files(write(tmp_path / "a", A), write(tmp_path / "b", B))
    assert found.counts == {"both": 8, "only_a": 4, "only_b": 16, "neither": 12}
    assert found.p == pytest.approx(0.011818, abs=1e-6)  # 2 * sum of C(20, 0..4) / 2^20 = 12392 / 1048576
    a, b, difference = found.scores["score"]
    assert (a.mean, b.mean, difference.mean) == pytest.approx((0.3, 0.6, 0.3))
    assert 0 < difference.low < 0.3 < difference.high < 0.6
    # Paired: narrower than the intervals of two independent samples would give.
    same = compare_files(tmp_path / "a", tmp_path / "a").scores["score"][2]
    assert (same.low, same.mean, same.high) == (0, 0, 0)
    assert found.scores["score_f1"][2].mean == pytest.approx(0.15)
    assert "B scores higher than A" in str(found)
    assert "only A 4, only B 16" in str(found)


def test_noise_is_called_noise(tmp_path: Path) -> None:
    found = compare_files(write(tmp_path / "a", [1, 0, 1, 0, 1, 0]), write(tmp_path / "b", [1, 0, 1, 1, 0, 1]))
    assert found.scores["score"][2].mean > 0
    assert "do not distinguish A and B" in str(found)


def test_order_of_lines_does_not_matter(tmp_path: Path) -> None:
    found = compare_files(write(tmp_path / "a", A), write(tmp_path / "b", B))
    write_records(reversed(read_records(tmp_path / "b")), tmp_path / "b")
    assert compare_files(tmp_path / "a", tmp_path / "b").to_dict() == found.to_dict()


def test_different_questions_are_refused(tmp_path: Path) -> None:
    a = write(tmp_path / "a", A)
    with pytest.raises(ValueError, match=r"short lacks 1 of the examples in .*a \(ids 39\).*test_limit"):
        compare_files(a, write(tmp_path / "short", B[:-1]))
    with pytest.raises(ValueError, match="40 of 40 examples have other prompts .* --ignore-prompts"):
        compare_files(a, write(tmp_path / "b", B, prompt="other"))
    assert compare_files(a, tmp_path / "b", ignore_prompts=True).counts["only_b"] == 16
    with pytest.raises(ValueError, match="have other targets"):
        compare_files(a, write(tmp_path / "b", B, target="other"), ignore_prompts=True)


def test_files_without_scores_are_refused(tmp_path: Path) -> None:
    a = write(tmp_path / "a", A)
    with pytest.raises(ValueError, match=r"b has no scores. Run `test` with --model.metric"):
        compare_files(a, write(tmp_path / "b", B, score=None, score_f1=None))
    with pytest.raises(ValueError, match="contains no predictions"):
        compare_files(a, write(tmp_path / "b", []))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"id": 0, "prompt": "p", "output": "x"}\n{"id"\n', "line 2 is not JSON"),
        ('{"id": 0, "prompt": "p"}\n', "line 1 lacks output"),
        ("[1]\n", "line 1 is no object"),
        ('{"id": 0, "prompt": "p", "output": "x"}\n' * 2, "line 2 has the id 0 of line 1"),
    ],
)
def test_broken_files_are_named_by_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_records(tmp_path / "p.jsonl")


def test_cut_off_last_line_of_an_unfinished_file_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "new" / "p.jsonl"
    row = {"id": 0, "prompt": "p", "output": "\u2028 \n"}
    append_records([row], path)
    append_records([{**row, "id": 1}], path)
    path.write_bytes(path.read_bytes() + b'{"id": 2, "prompt": "p", "outp')
    assert read_records(path, unfinished=True) == [row, {**row, "id": 1}]
    with pytest.raises(ValueError, match="line 3 is not JSON"):
        read_records(path)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(write(tmp_path / "a", A)), str(write(tmp_path / "b", B))]
    main(["compare", *files])
    assert "McNemar's exact test: p = 0.0118" in capsys.readouterr().out
    main(["compare", *files, "--json", "--confidence", "0.5", "--seed", "3"])
    told = json.loads(capsys.readouterr().out)
    assert told["files"] == {"a": files[0], "b": files[1]}
    assert told["counts"]["only_b"] == 16
    assert told["confidence"] == 0.5
    expected = compare_files(*files, confidence=0.5, seed=3).scores["score"][2]
    assert told["scores"]["score"]["difference"] == expected.to_dict()
    with pytest.raises(SystemExit):
        main(["compare", files[0], str(tmp_path / "none.jsonl")])
    assert "There is no file" in capsys.readouterr().err
