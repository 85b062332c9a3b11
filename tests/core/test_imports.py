"""Every module is imported on systems other than Unix too, and what these cannot report is left out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_pmss import PMSSCallback
from lightning_pmss.callbacks.throughput import peak_memory_gb
from lightning_pmss.files import process_memory
from tests.callbacks.toys import Toy, plain_loader, trainer

# The optional libraries (matplotlib, deepspeed, ...) are imported where they are used, so each module must import.
SCRIPT = """
import importlib, pkgutil, sys
import torch, lightning, transformers, datasets  # these may need the modules that are blocked below
for name in ("fcntl", "grp", "pwd", "resource", "termios"):
    sys.modules[name] = None
import lightning_pmss
names = [m.name for m in pkgutil.walk_packages(lightning_pmss.__path__, "lightning_pmss.") if "__main__" not in m.name]
for name in names:
    importlib.import_module(name)
print(len(names))
"""


def test_every_module_imports_without_the_modules_of_unix() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 80


def test_unknown_memory_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(process_memory, "resource", None)
    monkeypatch.setattr(process_memory, "Path", lambda name: tmp_path / name.strip("/"))  # no /proc
    assert process_memory.peak_memory() is None
    assert peak_memory_gb(torch.device("cpu")) is None
    run = trainer(tmp_path, PMSSCallback(rank=4, output_dir=tmp_path, merge_on_save=None), max_steps=2)
    run.fit(Toy(), plain_loader())
    assert "pmss/step_seconds" in run.callback_metrics
    assert "pmss/peak_memory_gb" not in run.callback_metrics
