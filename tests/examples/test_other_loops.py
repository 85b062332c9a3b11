"""PMSS without Lightning's Trainer: Fabric, the Trainer of transformers, plain inference."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.examples.test_examples import load


def test_fabric_then_inference(tiny_llama: str, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    options = ["--model", tiny_llama, "--rank", "8", "--steps", "20", "--lr", "2e-2", "--output", str(adapter)]
    losses = load("fabric").main(options)
    assert losses["last"] < losses["first"] - 0.05
    assert losses["loaded"] == pytest.approx(losses["trained"], rel=1e-5)
    texts = load("inference").main(["--base", tiny_llama, "--adapter", str(adapter), "--max-new-tokens", "8"])
    assert texts["generate"]
    assert texts["generate"] == texts["pipeline"] == texts["merged"]


def test_trainer_of_transformers(tiny_llama: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="the Trainer of transformers needs accelerate")
    options = ["--model", tiny_llama, "--rank", "8", "--steps", "20", "--lr", "2e-2", "--output", str(tmp_path / "run")]
    found = load("hf_trainer").main(options)
    assert len(found["losses"]) == 20
    assert found["losses"][-1] < found["losses"][0] - 0.05
    assert found["merged"] == pytest.approx(found["evaluation"], rel=1e-4)
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
