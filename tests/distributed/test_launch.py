"""The helper that launches ranks fails on the error of any rank, unless the task expects it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launch import check


def task(folder: Path, *records: dict[str, Any], **options: Any) -> dict[str, Any]:
    for rank, record in enumerate(records):
        (folder / f"rank{rank}.json").write_text(json.dumps(record))
    return {"folder": str(folder), **options}


def test_an_error_of_any_rank_fails_the_test(tmp_path: Path) -> None:
    check(task(tmp_path, {"losses": [1.0]}, {"losses": [1.0]}))
    for records in (({"error": "KeyError: x"}, {}), ({}, {"error": "KeyError: x"})):
        with pytest.raises(AssertionError, match=r"rank . of .*: KeyError: x"):
            check(task(tmp_path, *records))


def test_an_expected_error_must_come_on_every_rank(tmp_path: Path) -> None:
    record = {"error": "ValueError: rank 300 does not fit"}
    check(task(tmp_path, record, record, raises="does not fit"))
    with pytest.raises(AssertionError, match="rank 1 of .* did not fail, and 'does not fit' was expected"):
        check(task(tmp_path, record, {}, raises="does not fit"))
    with pytest.raises(AssertionError, match="ValueError: rank 300"):
        check(task(tmp_path, record, record, raises="another message"))


def test_a_rank_that_wrote_nothing_fails_the_test(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        check(task(tmp_path, {}))
