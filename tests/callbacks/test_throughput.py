"""Tokens per second and peak memory, as logged and as shown in the progress bar."""

from __future__ import annotations

import csv
import time
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_pmss import PMSSCallback
from lightning_pmss.callbacks.throughput import StepClock, peak_memory_gb
from lightning_pmss.datamodules import ArithmeticDataModule
from lightning_pmss.modules import CausalLMModule


def test_only_real_tokens_count_and_all_processes_do() -> None:
    clock = StepClock()
    batch = {
        "input_ids": torch.ones(2, 5, dtype=torch.int64),
        "attention_mask": torch.tensor([[1] * 5, [1] * 3 + [0] * 2]),
    }
    clock.start()
    time.sleep(0.05)
    figures = clock.figures(batch, world_size=3)
    assert figures["pmss/step_seconds"] >= 0.05
    assert figures["pmss/tokens_per_second"] == pytest.approx(8 * 3 / figures["pmss/step_seconds"])
    packed = {"input_ids": batch["input_ids"]}  # packed batches have positions in the place of the mask
    figures = clock.figures(packed, 1)
    assert figures["pmss/tokens_per_second"] == pytest.approx(10 / figures["pmss/step_seconds"])
    assert set(clock.figures(torch.ones(3), 1)) == {"pmss/step_seconds"}


def test_peak_memory_grows_by_what_is_held() -> None:
    before = peak_memory_gb(torch.device("cpu"))
    held = torch.ones(int(before * 1e9) // 4 + 50_000_000)  # as much again, and 200 MB
    assert peak_memory_gb(torch.device("cpu")) >= before + 0.15
    del held


def test_shown_in_the_bar_and_written_by_the_logger(tiny_llama: str, tmp_path: Path) -> None:
    trainer = L.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=CSVLogger(tmp_path),
        log_every_n_steps=1,
        limit_val_batches=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[PMSSCallback(rank=4, output_dir=tmp_path, merge_on_save=None)],
    )
    trainer.fit(CausalLMModule(tiny_llama), ArithmeticDataModule(tiny_llama, train_size=16, val_size=2, test_size=2))
    assert {"tok/s", "peak GB", "train/loss"} <= set(trainer.progress_bar_metrics)
    assert not [name for name in trainer.progress_bar_metrics if name.startswith("pmss/")]
    with (Path(trainer.log_dir or "") / "metrics.csv").open() as file:
        lines = csv.DictReader(file)
        assert "tok/s" not in (lines.fieldnames or [])
        rows = [row for row in lines if row["pmss/tokens_per_second"]]
    assert len(rows) == 2
    assert all(float(row["pmss/peak_memory_gb"]) > 0.05 for row in rows)
