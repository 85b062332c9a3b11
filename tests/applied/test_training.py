"""Training convolutions and embeddings with Lightning: resuming, checkpoints, results, precision, averages, two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from safetensors.torch import load_file, save_file

from lightning_pmss import load_adapter
from lightning_pmss.callbacks import FlatLoRA
from lightning_pmss.checkpoints.extract import extract_files
from lightning_pmss.conversion.convert import adapted_layers
from tests.applied.toys import config_of, targets
from tests.applied.training import Module, batches, fit
from tests.methods.cases import CASES
from tests.small_runs import two_runs


@pytest.mark.parametrize("method", list(CASES))
def test_a_resumed_run_is_the_run_and_its_checkpoint_has_the_adapter(method: str, tmp_path: Path) -> None:
    def run(folder: str, checkpoint: Path | None, **options: Any) -> Module:
        module = Module()
        saver = ModelCheckpoint(tmp_path / folder, "{step}", every_n_train_steps=4, save_top_k=-1)
        config = config_of(method, *(f"net.{name}" for name in targets(method)))
        fit(tmp_path / folder, module, config, saver, checkpoint=checkpoint, loader=batches(4), **options)
        return module

    whole = run("whole", None)
    assert whole.losses[-1] != whole.losses[0]
    checkpoint = tmp_path / "whole" / "step=4.ckpt"
    again = run("again", checkpoint)
    assert again.losses == whole.losses[4:]
    for file in ("adapter/adapter_model.safetensors", "merged/model.safetensors"):
        one, other = (load_file(tmp_path / name / "out" / file) for name in ("whole", "again"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], value) for key, value in other.items())
    saved = torch.load(checkpoint, weights_only=False)["state_dict"]
    assert not any(key == f"net.{name}.weight" for key in saved for name in targets(method))

    save_file(Module().state_dict(), tmp_path / "base.safetensors")
    run("short", None, max_steps=4)
    extract_files(checkpoint, tmp_path / "base.safetensors", tmp_path / "extracted", progress=False)
    one, other = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("short/out/adapter", "extracted"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], value) for key, value in other.items())

    ids = torch.randint(0, 23, (3, 9), generator=torch.Generator().manual_seed(2))
    loaded, merged = Module(), Module()
    load_adapter(loaded, tmp_path / "whole" / "out" / "adapter")
    merged.load_state_dict(load_file(tmp_path / "whole" / "out" / "merged" / "model.safetensors"))
    wanted = whole.net(ids)
    torch.testing.assert_close(loaded.net(ids), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merged.net(ids), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("method", ["pmss", "lora", "hira"])
def test_precision(method: str, precision: Any, tmp_path: Path) -> None:
    module = Module()
    fit(tmp_path, module, config_of(method, *targets(method)), precision=precision)
    assert all(t.dtype == torch.float32 for x in adapted_layers(module).values() for t in x.core.trained().values())
    assert all(torch.tensor(module.losses).isfinite())
    assert len(set(module.losses)) > 1


def test_averages(tmp_path: Path) -> None:
    module = Module()
    fit(tmp_path, module, config_of("pmss", *targets("pmss")), EMAWeightAveraging(decay=0.5))
    again = Module()
    load_adapter(again, tmp_path / "out" / "adapter")
    ids = torch.randint(0, 23, (3, 9), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(again.net(ids), module.net(ids), rtol=1e-4, atol=1e-5)


def test_what_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"FlatLoRA gives no noise to convolutions and embeddings, such as `net.along`"
    ):
        fit(tmp_path, Module(), config_of("lora", "along"), FlatLoRA())


@pytest.mark.distributed
def test_two_processes(tmp_path: Path) -> None:
    two_runs("tests.applied.training", tmp_path)
