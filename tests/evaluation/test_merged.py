"""A converted model answers the same merged and unmerged, and a folder that `merge` wrote as well."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_pmss import PMSSCallback, merge
from lightning_pmss.callbacks.results import write_merged_model
from lightning_pmss.conversion.convert import adapted_layers
from lightning_pmss.datamodules import GSM8KDataModule
from lightning_pmss.evaluation import compare_files, read_records
from lightning_pmss.modules import CausalLMModule
from tests.evaluation.script import OddTexts


def test_merged_and_unmerged_give_the_same_answers(shared: Path, fixtures: Path, tmp_path: Path) -> None:
    base = str(shared / "models" / "stories260K")
    options: dict[str, Any] = {"metric": OddTexts(), "max_new_tokens": 16}

    def tester(*callbacks: L.Callback) -> L.Trainer:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        return L.Trainer(accelerator="cpu", devices=1, default_root_dir=tmp_path, callbacks=list(callbacks), **quiet)

    data = GSM8KDataModule(base, path=str(fixtures / "gsm8k"), val_size=0, cache_dir=str(tmp_path / "cache"))
    module = CausalLMModule(base, predictions_dir=str(tmp_path / "base"), **options)
    trainer = tester(PMSSCallback(rank=8))
    trainer.test(module, data, verbose=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in adapted_layers(module).values():
            layer.core.weight.copy_(0.02 * torch.randn(layer.core.weight.shape, generator=generator))
    module.predictions_dir = str(tmp_path / "unmerged")
    trainer.test(module, data, verbose=False)
    write_merged_model(trainer, module, None, tmp_path / "folder")
    merge(module)
    module.predictions_dir = str(tmp_path / "merged")
    trainer.test(module, data, verbose=False)
    plain = CausalLMModule(str(tmp_path / "folder"), predictions_dir=str(tmp_path / "plain"), **options)
    tester().test(plain, data, verbose=False)

    files = {name: tmp_path / name / "predictions-test.jsonl" for name in ("base", "unmerged", "merged", "plain")}
    outputs = {name: [row["output"] for row in read_records(path)] for name, path in files.items()}
    assert outputs["unmerged"] == outputs["merged"] == outputs["plain"]
    assert outputs["unmerged"] != outputs["base"], "U changes no text, nothing is tested"
    found = compare_files(files["unmerged"], files["plain"])
    assert found.counts["only_a"] == found.counts["only_b"] == 0
    losses = [[row["loss"] for row in read_records(files[name])] for name in ("unmerged", "merged")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
