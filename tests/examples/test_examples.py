"""The examples run, on the tiny model, and do what they say."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tests import forks

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def load(name: str) -> Any:
    """The example as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_callback_in_your_trainer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = load("callback_in_your_trainer").main(["--output", str(tmp_path / "out")])
    assert scores["before"] < 0.75
    assert scores["after"] > 0.93
    assert "adapter" in capsys.readouterr().out
    assert (tmp_path / "out" / "adapter").is_dir()
    assert (tmp_path / "out" / "merged").is_dir()


def test_our_data_your_module(tiny_llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", tiny_llama, "--lr", "1e-2", "--cache-dir", str(tmp_path), "--steps"]
    scores = load("our_data_your_module").main([*options, "8"])
    assert set(scores) == {"accuracy"}
    assert "Packed 200 examples into" in capsys.readouterr().out


def test_custom_task(tiny_llama: str, tmp_path: Path) -> None:
    example = load("custom_task")
    scores = example.main(["--model", tiny_llama, "--cache-dir", str(tmp_path), "--steps", "4", "--rank", "8"])
    assert {"test/exact_match", "test/loss"} <= set(scores)
    loose, strict = example.SortingAccuracy(strict=False), example.SortingAccuracy()
    assert (loose.score(" ABC\nx", "abc"), strict.score(" ABC\nx", "abc"), strict.score("abc", "abc")) == (1, 0, 1)


def test_they_are_programs() -> None:
    done = forks.run([EXAMPLES / "custom_task.py", "--help"])
    assert done.returncode == 0, done.stderr
    assert "--steps" in done.stdout
