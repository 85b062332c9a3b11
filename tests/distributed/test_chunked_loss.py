"""The loss in chunks where the head is sharded: losses and trained weights are those of the plain loss under DDP."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.distributed.launch import launch, ranks, require

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def task(folder: Path, strategy: str, model: str, data: Path) -> dict[str, object]:
    # With checkpointed activations and clipping, as in `test_language`.
    common = {"model": model, "data": str(data / "gsm8k"), "steps": 3, "clip": 1e-4, "checkpointing": True}
    return {"folder": str(folder), "strategy": strategy, **common}


@pytest.fixture(scope="module")
def plain(tiny_llama: str, fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    launch("tests.distributed.language", [task(folder, "ddp", tiny_llama, fixtures)])
    return folder


@pytest.mark.parametrize("name", ["ddp", "fsdp1", "fsdp2", "zero2", "zero3"])
def test_equals_the_plain_loss(plain: Path, tmp_path: Path, name: str, tiny_llama: str, fixtures: Path) -> None:
    require(name)
    launch("tests.distributed.chunked", [task(tmp_path, name, tiny_llama, fixtures)])
    for expected, found in zip(ranks(plain), ranks(tmp_path), strict=True):
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert found["metrics"]["val/loss"] == pytest.approx(expected["metrics"]["val/loss"], rel=1e-5)
        assert found["frozen_gradients"] == 0
    wanted, got = (load_file(f / "out" / "adapter" / "adapter_model.safetensors") for f in (plain, tmp_path))
    assert wanted.keys() == got.keys()
    for key, value in wanted.items():
        assert (got[key].double() - value.double()).abs().max() <= 1e-4 * value.double().abs().max() + 1e-6, key
