"""docs/evidence.md says what the committed records say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.driver import read_records
from experiments.gradients import RECORD, gradient_table
from experiments.page import STUDIES, filled, section, total
from experiments.pictures import PICTURES
from experiments.study import SHOW, identity, read_study
from experiments.tables import norm_table, sweep_table, written

DOCS = Path(__file__).resolve().parents[2] / "docs"
NAMES = sorted(path.stem for path in STUDIES.glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_each_study_stands_on_the_page_as_its_records_have_it(name: str) -> None:
    study = read_study(STUDIES / f"{name}.yaml")
    page = (DOCS / "evidence.md").read_text(encoding="utf-8")
    assert section(study, read_records(), "evidence") in page, "run `python -m experiments page`"
    for picture in set(study.show) & set(PICTURES):
        assert (DOCS / "evidence" / f"{name}-{picture}.png").is_file()


def test_the_gradients_stand_on_the_page_as_their_record_has_them() -> None:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    assert gradient_table(record) in (DOCS / "evidence.md").read_text(encoding="utf-8")


def test_the_total_is_that_of_the_records() -> None:
    assert total({"a": {"seconds": 1800.0}, "b": {"seconds": 3600.0}}) == "The 2 runs on this page took 1.5 core-hours."
    assert total(read_records()) in (DOCS / "evidence.md").read_text(encoding="utf-8")


def test_norms_are_medians_by_kind_of_layer() -> None:
    study = read_study(STUDIES / "a1-pairs-small.yaml")
    arm = next(arm for arm in study.arms if arm.label == "lora 4")
    assert study.final is not None
    norms = ({"0.q_proj": 1.0, "1.q_proj": 5.0, "0.up_proj": 2.0}, {"0.q_proj": 3.0})
    specs = [study.spec(arm, study.sweep, lr, 0) for lr in arm.rates]
    sweep = {identity(s): {"scores": {"val/loss": abs(s["lr"] - 3e-3)}} for s in specs}
    finals = [study.spec(arm, study.final, 3e-3, seed) for seed in (1, 2)]
    found = {identity(s): {"spectra": {"norm": norm}} for s, norm in zip(finals, norms, strict=True)}
    head, _, row = norm_table(study, sweep | found).splitlines()
    assert [cell.strip() for cell in head.split("|")] == ["", "norm of the update", "q_proj", "up_proj", ""]
    assert [cell.strip() for cell in row.split("|")] == ["", "lora 4", "3.00", "2.00", ""]
    assert norm_table(study, sweep) == ""


def test_a_study_that_has_no_run_yet_has_no_table() -> None:
    study = read_study(STUDIES / "g9-muon.yaml")
    assert sweep_table(study, {}) == ""
    assert "details" not in section(study, {}, "evidence")


def test_rates_are_written_whole() -> None:
    assert [written(rate) for rate in (3e-3, 1.5e-2, 1.0)] == ["3e-03", "1.5e-02", "1e+00"]


def test_no_section_is_of_a_study_that_is_gone() -> None:
    page = (DOCS / "evidence.md").read_text(encoding="utf-8")
    assert (
        page.count("made by python -m experiments page -->")
        == len(NAMES) + 6  # and those of gradients, floor, combined, searches, enough and total
    )
    pictures = {path.name for path in (DOCS / "evidence").glob("*.png")}
    assert all(f"(evidence/{name})" in page for name in pictures)


def test_a_section_is_renewed_and_the_prose_around_it_kept() -> None:
    text = "before\n<!-- study x: made by python -m experiments page -->\nold\n<!-- end -->\nafter"
    mark = "<!-- study x: made by python -m experiments page -->"
    assert filled(text, {"x": "new \\1"}) == f"before\n{mark}\n\nnew \\1\n\n<!-- end -->\nafter"
    assert filled(filled(text, {"x": "new"}), {"x": "new"}) == filled(text, {"x": "new"})
    with pytest.raises(ValueError, match="no place for y; put these two lines"):
        filled(text, {"y": "new"})


def test_all_that_a_study_may_show_is_made() -> None:
    assert set(SHOW) == {*PICTURES, "norms", "sweep"}


@pytest.mark.parametrize("name", NAMES)
def test_pictures_are_drawn(name: str, tmp_path: Path) -> None:
    study = read_study(STUDIES / f"{name}.yaml")
    records = read_records()
    for picture in set(study.show) & set(PICTURES):
        assert PICTURES[picture](study, records, tmp_path / "picture.png").stat().st_size > 5000
