"""Settings of these tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def trainer(tmp_path: Any) -> Callable[..., L.Trainer]:
    """Makes a quiet CPU Trainer that writes below tmp_path."""

    def make(**options: Any) -> L.Trainer:
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        base = {"accelerator": "cpu", "devices": 1, "logger": False, "default_root_dir": tmp_path, "max_epochs": 1}
        return L.Trainer(**{**base, **quiet, **options})

    return make
