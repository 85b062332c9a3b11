"""Messages of a run name the method that is trained: U and PMSS are words of PMSS alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_pmss import AdapterCallback, CURLoRAConfig, HiRAConfig, LoRAConfig, MiSSConfig, convert, merge
from tests.callbacks import toys
from tests.callbacks.test_pmss import Detached, NaNLoss, trainer
from tests.callbacks.test_pmss import plain_loader as loader

OF_PMSS = re.compile(r"\bU\b|\bPMSS\b")


@pytest.mark.parametrize(("config", "label"), [(LoRAConfig, "LoRA"), (MiSSConfig, "MiSS"), (HiRAConfig, "HiRA")])
def test_a_run_of_another_method_says_nothing_of_pmss(
    config: Any, label: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def callback() -> AdapterCallback:
        return AdapterCallback(config(target_modules=["net.0", "net.2"], rank=4), output_dir=tmp_path / "out")

    with caplog.at_level("INFO"):
        trainer(tmp_path, callback()).fit(toys.Toy(), loader())
    told = "\n".join(record.getMessage() for record in caplog.records)
    assert f"{label}:\n" in told
    assert f"{label}: adapter in " in told
    assert not OF_PMSS.search(told)
    merged = toys.Toy()
    convert(merged, callback().config)
    merge(merged)
    for module, message in (
        (Detached(), r"No gradient reached the adapter of 1 of 2 converted layers: `net\.0`"),
        (NaNLoss(), r"the adapter of 2 converted layers got NaN or infinite gradients in the first step"),
        (merged, r"The model is merged, so the adapter has no effect"),
    ):
        with pytest.raises(MisconfigurationException, match=message) as error:
            trainer(tmp_path, callback()).fit(module, loader())
        assert not OF_PMSS.search(str(error.value))


def test_a_merged_layer_in_a_loop_of_ones_own() -> None:
    for config, message in ((LoRAConfig, "so the adapter has no effect"), (CURLoRAConfig, "so U has no effect")):
        model = toys.make_net()
        convert(model, config(rank=4))
        merge(model)
        with pytest.raises(RuntimeError, match=message):
            model.train()(torch.randn(3, 16)).sum().backward()
