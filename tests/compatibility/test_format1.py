"""Files of format 1 that users have still load: an adapter folder, and a checkpoint to train on from."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from lightning_pmss import load_adapter
from tests.compatibility import run

FILES = Path(__file__).parent / "format1"
EXPECTED = json.loads((FILES / "expected.json").read_text())


def test_adapter_loads() -> None:
    module = run.Module()
    batch = next(iter(run.loader()))[0]
    before = module.net(batch)
    load_adapter(module, FILES / "adapter")
    expected = torch.tensor(EXPECTED["outputs"])
    torch.testing.assert_close(module.net.eval()(batch), expected, rtol=1e-5, atol=1e-6)
    assert (before - expected).abs().max() > 0.1  # an adapter that was not loaded would be seen


def test_checkpoint_resumes(tmp_path: Path) -> None:
    resumed = run.fit(tmp_path, FILES / "checkpoint.ckpt")
    expected = EXPECTED["losses"][run.STOPPED_AT :]
    torch.testing.assert_close(torch.tensor(resumed.losses), torch.tensor(expected), rtol=1e-5, atol=1e-6)
