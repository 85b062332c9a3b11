"""Tokens per second and peak memory, as logged and as shown in the progress bar."""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lightning_pmss import PMSSCallback
from lightning_pmss.callbacks.throughput import StepClock, peak_memory_gb
from lightning_pmss.conversion.convert import adapted_layers
from lightning_pmss.datamodules import ArithmeticDataModule
from lightning_pmss.modules import CausalLMModule
from tests.callbacks import toys


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


class Norms(L.Callback):
    """Norms of the updates after each batch, and a stop between two logged steps."""

    def __init__(self, stop_at: int | None) -> None:
        self.after_batches: list[dict[str, float]] = []
        self.stop_at = stop_at

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        layers = adapted_layers(pl_module).items()
        norms = {name: layer.update().numbers() for name, layer in layers}
        self.after_batches.append(
            {name: torch.cat([*map(torch.flatten, n.values())]).norm() for name, n in norms.items()}
        )
        if trainer.global_step == self.stop_at:
            trainer.should_stop = True


@pytest.mark.parametrize(
    ("every", "accumulate", "stop_at", "logged"),
    [(10, 1, None, [9, 19, 29]), (10, 3, None, [9]), (1, 2, None, [*range(15)]), (10, 1, 14, [9]), (0, 1, None, [])],
)
def test_norms_are_of_the_step_that_they_are_logged_with(
    tmp_path: Path, every: int, accumulate: int, stop_at: int | None, logged: list[int]
) -> None:
    norms = Norms(stop_at)
    runner = toys.trainer(
        tmp_path,
        PMSSCallback(rank=4, output_dir=tmp_path / "out", merge_on_save=None, log_u_norm=True),
        norms,
        logger=CSVLogger(tmp_path),
        log_every_n_steps=every,
        accumulate_grad_batches=accumulate,
        max_epochs=1,
    )
    runner.fit(toys.Toy(), DataLoader(toys.inputs(120), batch_size=4))
    with (Path(runner.log_dir or "") / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("pmss/u_norm/net.0")]
    assert [int(row["step"]) for row in rows] == logged
    for row in rows:
        batch = accumulate * (int(row["step"]) + 1) - 1
        for name, norm in norms.after_batches[batch].items():
            assert float(row[f"pmss/u_norm/{name}"]) == pytest.approx(float(norm), rel=1e-5)
            assert norm > 0
