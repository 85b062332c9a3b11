"""Every recipe in configs/ parses, says how it is launched, and names existing options only."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lightning_pmss.cli import main

CONFIGS = sorted((Path(__file__).resolve().parents[1] / "configs").rglob("*.yaml"))


def test_there_are_recipes() -> None:
    assert {"quickstart.yaml", "gsm8k_smollm2.yaml"} <= {path.name for path in CONFIGS}


@pytest.mark.parametrize("command", ["fit", "test"])
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipe_parses(path: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--config", str(path), "--print_config"])
    assert stop.value.code in (0, None), capsys.readouterr().err
    printed = yaml.safe_load(capsys.readouterr().out)
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert printed["pmss"]["rank"] == written["pmss"]["rank"]
    assert printed["model"]["class_path"] == written["model"]["class_path"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_first_lines_say_how_to_launch_on_what_and_what_it_took(path: Path) -> None:
    head = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        head.append(line)
    text = "\n".join(head)
    for word in ("# Launch:", "# Hardware:", "# Took:"):
        assert word in text
    assert path.name in text
