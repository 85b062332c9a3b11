"""`enough` on a small recipe, with `fake_fit` in the place of the trainings."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from lightning_pmss.cli import main
from lightning_pmss.runs import process

FAKE = Path(__file__).with_name("fake_fit.py")
Enough = Callable[..., int]


@pytest.fixture
def enough(tiny_tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Enough:
    """Run `enough` on a recipe with 64 problems; returns the exit status. ``fake`` is what runs do, by their folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(process, "PROGRAM", (sys.executable, str(FAKE)))
    Path("recipe.yaml").write_text(
        yaml.safe_dump(
            {
                "model": {"class_path": "CausalLMModule", "init_args": {"model_name_or_path": tiny_tokenizer}},
                "data": {
                    "class_path": "ArithmeticDataModule",
                    "init_args": {
                        "train_size": 64, "val_size": 10, "test_size": 4, "batch_size": 8, "cache_dir": str(tmp_path / "cache"),
                    },
                },
                "trainer": {"accelerator": "cpu", "max_steps": 12},
            }
        )
    )  # fmt: skip

    def run(*words: str, fake: dict[str, str] | None = None) -> int:
        monkeypatch.setenv("FAKE", json.dumps(fake or {}))
        try:
            main(["enough", "--config", "recipe.yaml", "--output", "study", *words])
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    return run
