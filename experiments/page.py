"""Puts the tables and pictures of all studies into docs/evidence.md, between marks; the prose around them is by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.combined import RECORD as COMBINED
from experiments.combined import combined_table
from experiments.driver import spent_minutes
from experiments.enough import RECORD as ENOUGH
from experiments.enough import enough_text
from experiments.floor import RECORD as FLOOR
from experiments.floor import floor_text
from experiments.gradients import RECORD, gradient_table
from experiments.pictures import PICTURES
from experiments.searches import RECORD as SEARCHES
from experiments.searches import searches_text
from experiments.study import Study, read_study
from experiments.tables import difference_table, final_table, noise_table, norm_table, sweep_table

STUDIES = Path(__file__).parent / "studies"
_MARK = "<!-- study {name}: made by python -m experiments page -->"
_END = "<!-- end -->"


def section(study: Study, records: Mapping[str, Any], pictures: str) -> str:
    """What stands between the marks of a study."""
    spent = spent_minutes(study, dict(records))
    parts = [
        f"*{study.asks}*",
        f"Runs finished took {spent:.0f} minutes of one core; the budget was {study.budget_minutes:.0f}.",
    ]
    if study.final is not None:
        parts += [final_table(study, records), difference_table(study, records)]
    if "noise" in study.show:
        parts.append(noise_table(study, records))
    if "norms" in study.show:
        parts.append(norm_table(study, records))
    if "sweep" in study.show and (rates := sweep_table(study, records)):
        parts += [f"<details markdown><summary>{study.by} at each rate</summary>", rates, "</details>"]
    parts += [
        f"![{name} of {study.name}]({pictures}/{study.name}-{name}.png)" for name in study.show if name in PICTURES
    ]
    return "\n\n".join(part for part in parts if part)


def total(records: Mapping[str, Any]) -> str:
    """How many runs there are, and what they took."""
    hours = sum(record["seconds"] for record in records.values()) / 3600
    return f"The {len(records)} runs on this page took {hours:.1f} core-hours."


def filled(text: str, sections: Mapping[str, str]) -> str:
    """The page with each study's section renewed.

    Raises:
        ValueError: A study has no marks in the page.
    """
    for name, body in sections.items():
        mark = _MARK.format(name=name)
        pattern = re.compile(re.escape(mark) + r".*?" + re.escape(_END), re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"the page has no place for {name}; put these two lines where it belongs:\n{mark}\n{_END}")
        text = pattern.sub(lambda _, mark=mark, body=body: f"{mark}\n\n{body}\n\n{_END}", text)  # type: ignore[misc]
    return text


def write_page(records: Mapping[str, Any], docs: Path) -> Path:
    """Renew ``docs/evidence.md`` and ``docs/evidence/*.png``."""
    folder = docs / "evidence"
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.png"):  # of studies that are gone, too
        old.unlink()
    studies = [read_study(path) for path in sorted(STUDIES.glob("*.yaml"))]
    for study in studies:
        for name in study.show:
            if name in PICTURES:
                PICTURES[name](study, records, folder / f"{study.name}-{name}.png")
    page = docs / "evidence.md"
    sections = {s.name: section(s, records, "evidence") for s in studies}
    sections["gradients"] = gradient_table(json.loads(RECORD.read_text(encoding="utf-8")))
    sections["floor"] = floor_text(json.loads(FLOOR.read_text(encoding="utf-8")))
    sections["combined"] = combined_table(json.loads(COMBINED.read_text(encoding="utf-8")))
    sections["enough"] = enough_text(json.loads(ENOUGH.read_text(encoding="utf-8")))
    sections["searches"] = searches_text(json.loads(SEARCHES.read_text(encoding="utf-8")))
    sections["total"] = total(records)
    text = filled(page.read_text(encoding="utf-8"), sections)
    page.write_text(text, encoding="utf-8")
    return page
