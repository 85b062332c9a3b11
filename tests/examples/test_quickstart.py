"""The quickstart ends with three questions, drawn before the training, each answer marked as the metric scored it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from examples import quickstart
from tests.cli.test_cli import small


def record(output: str, score: float) -> dict[str, object]:
    return {"prompt": "Question: How many?\nAnswer:", "target": "#### 12", "output": output, "score": score}


def test_it_ends_with_three_questions_before_and_after(
    tiny_llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = small(tiny_llama, tmp_path)[2:]  # without --config, which the script gives itself
    assert quickstart.main(options) == 0
    end = capsys.readouterr().out.split("\n3 of the 8 test questions")[1]
    run = tmp_path / "runs" / "quickstart" / "version_0"
    before, after = quickstart.answers(run / "before"), quickstart.answers(run / "after")
    assert end.rstrip().endswith(quickstart.comparison(quickstart.draw(before), before, after).rstrip())
    assert len(re.findall(r"^Question: ", end, re.MULTILINE)) == 3
    assert len(re.findall(r"^  (?:before|after): +(?:right|wrong) ", end, re.MULTILINE)) == 6


def test_answers_are_marked_as_the_metric_scored_them() -> None:
    text = quickstart.comparison([5], {5: record("I see 12.", 0)}, {5: record("4 * 3 = 12\n#### 12", 1.0)})
    assert text.splitlines()[:4] == [
        "Question: How many?",
        "  expected        #### 12",
        "  before: wrong   I see 12.",
        "  after:  right   4 * 3 = 12 #### 12",
    ]


def test_the_questions_do_not_depend_on_the_answers() -> None:
    ids = [3, 1, 2, 9, 4]
    drawn = quickstart.draw(ids)
    assert drawn == quickstart.draw(reversed(ids))
    assert len(set(drawn)) == 3
    assert quickstart.draw([7]) == [7]
