"""What happens on the way: a rank is killed, the model is born without weights, the user forgets a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lightning_pmss import LoRAXSConfig, PMSSConfig, convert
from lightning_pmss.files import save_skeleton
from tests.distributed.launch import launch, ranks, require
from tests.distributed.script import base_model

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.mark.parametrize("name", ["fsdp1", "fsdp2", "zero3"])
def test_a_killed_rank_leaves_the_last_checkpoint(tmp_path: Path, name: str) -> None:
    require(name)
    whole = {"folder": str(tmp_path / "whole"), "strategy": name, "steps": 6}
    killed = {"folder": str(tmp_path / "killed"), "strategy": name, "steps": 6, "one_file": True, "kill_at": 4}
    launch("tests.distributed.script", [killed], fails=True)
    saved = tmp_path / "killed" / "saved" / "last.ckpt"
    assert saved.is_dir()
    again = {"folder": str(tmp_path / "again"), "strategy": name, "steps": 6, "checkpoint": str(saved)}
    launch("tests.distributed.script", [whole, again])
    for rank in (0, 1):
        resumed = ranks(tmp_path / "again")[rank]["losses"]
        assert resumed == ranks(tmp_path / "whole")[rank]["losses"][2:]  # the checkpoint is that of step 2


@pytest.fixture(scope="module")
def skeleton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A skeleton file of the base, rows and columns by another seed than the default."""
    model = torch.nn.Module()
    model.net = base_model()
    convert(model, PMSSConfig(rank=8, seed=7))
    return save_skeleton(model, tmp_path_factory.mktemp("skeleton") / "skeleton.safetensors")


def test_meta_and_partitioned_models_convert_from_a_skeleton_file(tmp_path: Path, skeleton: Path) -> None:
    tasks: list[dict[str, Any]] = []
    for name, extra in (("ddp", {}), ("fsdp2", {"meta": True}), ("zero3", {})):
        options = {"callback": {"skeleton_file": str(skeleton)}, "strategy": name}
        tasks.append({"folder": str(tmp_path / name), **options, **extra})
    require("zero3")
    launch("tests.distributed.script", tasks[:2])
    launch("tests.distributed.script", tasks[2:])
    expected = ranks(tmp_path / "ddp")
    for name in ("fsdp2", "zero3"):
        found = ranks(tmp_path / name)
        for rank in (0, 1):
            assert found[rank]["indices"] == expected[rank]["indices"]
            assert found[rank]["losses"] == pytest.approx(expected[rank]["losses"], rel=1e-5)
            assert found[rank]["sums"] == pytest.approx(expected[rank]["sums"])


def test_meta_and_partitioned_models_take_singular_vectors_from_a_file(tmp_path: Path) -> None:
    """LoRA-XS: losses and merged weights are those of DDP, which computes the singular vectors from weights in memory."""
    model = torch.nn.Module()
    model.net = base_model()
    convert(model, LoRAXSConfig(rank=8))
    file = save_skeleton(model, tmp_path / "vectors.safetensors")
    given = {"callback": {"skeleton_file": str(file)}}
    tasks: list[dict[str, Any]] = [
        {"folder": str(tmp_path / name), "strategy": name, "method": "lora_xs"} | extra
        for name, extra in (("ddp", {}), ("fsdp2", {"meta": True} | given), ("zero3", given))
    ]
    require("zero3")
    launch("tests.distributed.script", tasks[:2])
    launch("tests.distributed.script", tasks[2:])
    expected = ranks(tmp_path / "ddp")
    weights = load_file(tmp_path / "ddp" / "out" / "merged" / "model.safetensors")
    for name in ("fsdp2", "zero3"):
        for found, one in zip(ranks(tmp_path / name), expected, strict=True):
            assert found["losses"] == pytest.approx(one["losses"], rel=1e-5)
            assert found["losses"][-1] != found["losses"][0]
        for key, value in load_file(tmp_path / name / "out" / "merged" / "model.safetensors").items():
            torch.testing.assert_close(value, weights[key], rtol=1e-3, atol=1e-5)


def test_what_cannot_work_says_what_to_type(tmp_path: Path, skeleton: Path) -> None:
    tasks: dict[str, dict[str, Any]] = {
        "careless": {
            "careless": True,
            "raises": "already sharded; convert before `fully_shard`: call `model_built(self)`",
        },
        "inference": {"inference_mode": True, "raises": "Type Trainer(inference_mode=False)"},
        "meta": {
            "meta": True,
            "raises": "is on the meta device: its rows and columns cannot be chosen; load the weights first",
        },
        "meta, without vectors": {
            "meta": True,
            "method": "lora_xs",
            "raises": "its singular vectors need W; load the weights first or give skeleton_file=",
        },
        "wrong": {
            "meta": "wrong",
            "callback": {"skeleton_file": str(skeleton)},
            "raises": "skeleton file belongs to another base model",
        },
    }
    given = [{"folder": str(tmp_path / k), "strategy": "fsdp2", "steps": 1} | t for k, t in tasks.items()]
    launch("tests.distributed.script", given)  # compares the message of every rank with "raises"
