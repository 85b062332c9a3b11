"""The table of scores by the number of training examples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from experiments import enough
from experiments.enough import collect, enough_text


def result(scores: dict[int, tuple[float, float | None]], **more: Any) -> dict[str, Any]:
    sizes = [
        {"size": size, "score": {"count": 1 if half is None else 2, "mean": mean, "half": half}, "gain": None}
        for size, (mean, half) in scores.items()
    ]
    common = {"monitor": "val/loss", "equal": "epochs", "sentences": ["Less.", "More."], "missing": 0, "failures": {}}
    return common | {"sizes": sizes, "noise": 0.0123} | more


def test_a_row_for_each_study() -> None:
    one = result({50: (1.5, 0.25), 100: (1.25, 0.125)})
    text = enough_text({"lora": one, "pmss": result({100: (2.0, None)}, noise=None)})
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert lines[0] == ["examples", "50", "100", "noise of a run", "seeds"]
    assert lines[2] == ["lora", "1.500 ± 0.250", "1.250 ± 0.125", "0.012", "2"]
    assert lines[3] == ["pmss", "", "2.000", "", "1"]
    assert "- lora: Less. More." in text


def test_only_studies_that_have_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enough, "RECORD", tmp_path / "record.json")
    folder = tmp_path / "lora"
    folder.mkdir()
    with pytest.raises(ValueError, match=r"lora has no enough\.json"):
        collect([folder])
    (folder / "enough.json").write_text(json.dumps(result({50: (1.0, None)}, missing=2)))
    with pytest.raises(ValueError, match="lora: the study has not ended"):
        collect([folder])
    (folder / "enough.json").write_text(json.dumps(result({50: (1.0, None)})))
    collect([folder])
    record = tmp_path / "record.json"
    assert json.loads(record.read_text())["lora"]["sizes"][0]["size"] == 50
    other = folder.rename(tmp_path / "hira")
    collect([other])
    assert list(json.loads(record.read_text())) == ["hira", "lora"]  # those of other names stay
    (other / "enough.json").write_text(json.dumps(result({60: (1.0, None)})))
    collect([other])
    assert json.loads(record.read_text())["hira"]["sizes"][0]["size"] == 60
