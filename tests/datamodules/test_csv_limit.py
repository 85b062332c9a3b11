"""Reading CSV leaves the process's limit of a cell as it was."""

from __future__ import annotations

import csv
from pathlib import Path

from lightning_pmss.datamodules.rows import read_csv_rows


def test_large_cells_are_read_and_the_limit_stays(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    (tmp_path / "rows.csv").write_text(f"text\n{'a' * (before + 1)}\nb\n", encoding="utf-8")
    rows = read_csv_rows(tmp_path / "rows.csv")
    assert len(next(rows)[1]["text"]) == before + 1  # type: ignore[arg-type]
    assert csv.field_size_limit() == before
    assert [row["text"] for _, row in rows] == ["b"]
