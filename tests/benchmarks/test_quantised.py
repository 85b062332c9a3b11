"""`benchmarks.quantised` at its smallest: what it must say, whether its figures are good is not asked here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import quantised

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install lightning-pmss[quantised]")


def test_layer_and_train(tmp_path: Path, tiny_llama: str) -> None:
    file = tmp_path / "layer.json"
    sizes = ["--shape", "64", "128", "--rank", "8", "--tokens", "4", "--repeats", "2"]
    quantised.main(["layer", "--kinds", "nf4", *sizes, "--json", str(file)])
    (row,) = json.loads(file.read_text())["layers"]
    assert list(row["ratio"]) == ["frozen", "regather", "keep"]

    file = tmp_path / "train.json"
    sizes = ["--steps", "2", "--batch", "2", "--held-out", "2", "--rank", "4"]
    quantised.main(["train", "--kinds", "nf4", "int8", "--model", tiny_llama, *sizes, "--json", str(file)])
    record = json.loads(file.read_text())
    assert [run["kind"] for run in record["runs"]] == ["none", "nf4", "int8"]
    for run in record["runs"]:
        assert len(run["losses"]) == 2
        assert run["held_out_after"] != run["held_out_before"]
        dense = next(iter(run["merge"].values()))
        assert dense["held_out"] == pytest.approx(run["held_out_after"], rel=1e-3)
    assert list(record["runs"][1]["merge"]) == ["dequantise", "requantise"]
    assert tiny_llama not in json.dumps(record)
