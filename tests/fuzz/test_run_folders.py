"""Run folders, for `report`."""

from __future__ import annotations

import json
import random as randomness
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_pmss.cli import main
from lightning_pmss.conversion.convert import adapted_layers, convert
from lightning_pmss.files import save_adapter
from lightning_pmss.methods.pmss.config import PMSSConfig
from tests.fuzz.mutations import copied, mutate
from tests.fuzz.trying import COUNT, LIMIT, attempt, cases, state

pytestmark = LIMIT

pytest.importorskip("matplotlib")


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 10))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with everything that a page shows, and its base beside it."""
    parent = tmp_path_factory.mktemp("fuzz")
    base, folder = parent / "base", parent / "run"
    base.mkdir()
    save_file(model().state_dict(), base / "model.safetensors")
    (base / "config.json").write_text("{}")
    trained = model()
    convert(trained, PMSSConfig(rank=4))
    for layer in adapted_layers(trained).values():
        nn.init.normal_(layer.core.weight)
    save_adapter(trained, folder / "adapter", base=str(base))
    (folder / "config.yaml").write_text("model: x\n")
    (folder / "hparams.yaml").write_text("rank: 4\n")
    names = ["epoch", "pmss/peak_memory_gb", "pmss/tokens_per_second", "step", "train/loss", "val/f1", "val/loss"]
    rows = [[0, 1.5, 100 + step, step, 1 / (step + 1), "", ""] for step in range(30)]
    rows[20] = [0, "", "", 20, "", 0.5, 0.1]
    (folder / "metrics.csv").write_text("\n".join(",".join(map(str, row)) for row in [names, *rows]) + "\n")
    summary = {"n": 5, "scores": {"score": {"mean": 0.5, "low": 0.2, "high": 0.8, "n": 5}}, "logged": {"f1": 0.5}}
    (folder / "summary-test.json").write_text(json.dumps(summary))
    return folder


def test_reports(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, random in cases("report", -(-COUNT // 4)):
        folder, base = copied(run, tmp_path / "run"), copied(run.parent / "base", tmp_path / "base")
        about = folder / "adapter" / "adapter_config.json"
        about.write_text(about.read_text().replace(str(run.parent / "base"), str(base)))
        told = f"seed {seed}: {mutate(base if random.random() < 0.15 else folder, random)}"
        options = random.choice(([], [], ["--base", str(base)]))
        before = state(tmp_path)
        randomness.seed(0)
        found = attempt(lambda: main(["report", str(folder), *options]), told, (SystemExit,))  # noqa: B023
        said = capsys.readouterr()
        assert "Traceback" not in said.err, told
        after = state(tmp_path)
        page = after.pop("run/report.html", None)
        assert after == before, told
        assert (page is None) == isinstance(found, SystemExit), told
        if page is None:
            assert said.err.startswith("python -m lightning_pmss report: error: "), told
            assert said.err.count("\n") == 1, f"{told}: {said.err}"
        else:
            assert page.endswith(b"</html>"), told
