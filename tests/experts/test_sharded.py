"""Engines that keep the parameters of experts in parts: a run is that of one device, and goes on where it was stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from lightning_pmss import load_adapter
from lightning_pmss.checkpoints.extract import extract_files
from lightning_pmss.conversion.convert import adapted_layers
from tests.distributed.launch import launch, per_strategy, ranks, whole_and_resumed
from tests.experts.sharded import EXPERTS, STEPS, run
from tests.experts.toys import SIZES, mixture, tokens

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
NAMES = ["fsdp2", "fsdp1", "zero2", "zero3"]
METHODS = ["pmss", "pmss columns=all", "lora", "miss", "lora_xs", "curlora", "bat", "hira", "hut"]
ONE_FILE = ["fsdp1-full", "fsdp2-full"]  # instead of a folder; run with PMSS alone
MORE: dict[str, dict[str, Any]] = {
    "transposed": {"model": "gpt_oss", "method": "pmss"},  # parameters [experts, in, out], with biases
    "transposed, formed": {"model": "gpt_oss", "method": "bat"},
    "checkpointing": {"model": "qwen3_moe", "method": "pmss columns=all", "checkpointing": True},
    "checkpointing, frozen factors": {"model": "mixtral", "method": "lora_xs", "checkpointing": True},
}
AUTOCAST = {"model": "mixtral", "method": "lora", "precision": "bf16-mixed"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Strategy -> folder with, for each method, the whole run and one that is resumed after two of four steps."""
    parent = tmp_path_factory.mktemp("sharded")

    def launched(name: str) -> Path:
        more = MORE | {"autocast": AUTOCAST}
        tasks = [task | {"strategy": name, "folder": str(parent / name / which)} for which, task in more.items()]
        for method in METHODS:
            folder = parent / name / method
            task = {"strategy": name, "method": method, "model": "mixtral"}
            tasks += whole_and_resumed(folder, task, 2)
        task = {"strategy": name, "method": "pmss", "model": "mixtral", "options": {"selection": "random", "seed": 1}}
        checkpoint = str(parent / name / "pmss" / "whole" / "saved" / "step=2.ckpt")
        tasks.append(task | {"folder": str(parent / name / "other indices"), "checkpoint": checkpoint})
        if name == "fsdp2":
            task = {"strategy": "fsdp2", "method": "lora_xs", "model": "mixtral", "late": True}
            tasks.append(task | {"folder": str(parent / name / "late")})
        if name in ONE_FILE:
            tasks = [task for task in tasks if task["method"] == "pmss" and task["model"] == "mixtral"]
        if name == "plain":
            for task in tasks:
                Path(task["folder"]).mkdir(parents=True)
                run(task)
        else:
            launch("tests.experts.sharded", tasks, timeout=60 * len(tasks))
        return parent / name

    return per_strategy(launched)


def compare_losses(own: Path, one: Path, rel: float = 1e-5) -> None:
    alone, pair = ranks(one, 1)[0], ranks(own)
    assert len(alone["losses"]) == STEPS
    means = [(first + second) / 2 for first, second in zip(pair[0]["losses"], pair[1]["losses"], strict=True)]
    assert means == pytest.approx(alone["losses"], rel=rel)


def compare(own: Path, one: Path) -> None:
    """Losses, norms, adapter and merged model of two ranks and of one process."""
    compare_losses(own, one)
    alone, pair = ranks(one, 1)[0], ranks(own)
    for record in pair:
        assert record["norms"] == pytest.approx(alone["norms"], rel=1e-4)
    for file in ("adapter/adapter_model.safetensors", "merged/model.safetensors"):
        found, expected = (load_file(folder / "out" / file) for folder in (own, one))
        assert found.keys() == expected.keys()
        for (
            key,
            value,
        ) in expected.items():  # a few numbers, whose gradients are almost zero, Adam moves by their rounding
            assert torch.dist(found[key].double(), value.double()) <= 1e-3 * value.double().norm() + 1e-6, key


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_losses_norms_and_files_are_those_of_one_device(runs: Any, name: str, method: str) -> None:
    own, one = runs(name) / method / "whole", runs("plain") / method / "whole"
    compare(own, one)
    first, second = ranks(own)
    assert first["ran"] != second["ran"]  # some experts had tokens on one rank only
    alone = ranks(one, 1)[0]
    assert any(alone["norms"].values())
    if name != "zero2":  # no rank has all of W
        parts = [sum(n for key, n in record["held"].items() if key.endswith("_proj")) for record in (first, second)]
        whole = sum(n for key, n in alone["held"].items() if key.endswith("_proj"))
        assert sum(parts) == pytest.approx(whole, abs=2)
        assert max(parts) < 0.7 * whole


@pytest.mark.parametrize("which", list(MORE))
@pytest.mark.parametrize("name", NAMES)
def test_other_layouts_and_recomputed_blocks(runs: Any, name: str, which: str) -> None:
    compare(runs(name) / which, runs("plain") / which)


@pytest.mark.parametrize("name", NAMES)
def test_autocast(runs: Any, name: str) -> None:
    """FSDP1 and DeepSpeed compute more in bfloat16 than autocast does."""
    compare_losses(runs(name) / "autocast", runs("plain") / "autocast", rel=2e-2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_resume_equals_never_stopped(runs: Any, name: str, method: str) -> None:
    folder = runs(name) / method
    for whole, resumed in zip(ranks(folder / "whole"), ranks(folder / "resumed"), strict=True):
        assert resumed["losses"] == whole["losses"][2:]  # to the last bit
        assert resumed["norms"] == whole["norms"]


@pytest.mark.parametrize("name", ONE_FILE)
def test_a_checkpoint_of_one_file(runs: Any, name: str) -> None:
    folder = runs(name) / "pmss"
    compare(folder / "whole", runs("plain") / "pmss" / "whole")
    for whole, resumed in zip(ranks(folder / "whole"), ranks(folder / "resumed"), strict=True):
        assert resumed["losses"] == whole["losses"][2:]
        assert resumed["norms"] == whole["norms"]


@pytest.mark.parametrize("name", [*NAMES, *ONE_FILE])
def test_indices_of_a_checkpoint_replace_those_selected_now(runs: Any, name: str) -> None:
    for expected, found in zip(ranks(runs(name) / "pmss" / "whole"), ranks(runs(name) / "other indices"), strict=True):
        assert found["losses"] == pytest.approx(expected["losses"][2:], rel=1e-5)
        assert found["norms"] == pytest.approx(expected["norms"], rel=1e-4)


def test_frames_follow_weights_that_are_loaded_after_sharding(runs: Any) -> None:
    compare(runs("fsdp2") / "late", runs("plain") / "lora_xs" / "whole")


@pytest.mark.parametrize("method", ["pmss", "lora"])
@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_gives_the_adapter_and_that_loads(runs: Any, name: str, method: str, tmp_path: Path) -> None:
    folder = runs(name) / method / "whole"
    base = mixture("mixtral", num_hidden_layers=1, num_local_experts=EXPERTS)
    base.save_pretrained(tmp_path / "base")
    extract_files(folder / "saved" / f"step={STEPS}.ckpt", tmp_path / "base", tmp_path / "adapter", progress=False)
    own, found = (
        load_file(place / "adapter_model.safetensors") for place in (folder / "out" / "adapter", tmp_path / "adapter")
    )
    assert found.keys() == own.keys()
    assert all(torch.equal(value, own[key]) for key, value in found.items())
    load_adapter(base, tmp_path / "adapter")
    merged = MixtralForCausalLM.from_pretrained(folder / "out" / "merged")
    torch.testing.assert_close(merged(tokens()).logits, base(tokens()).logits, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def language(tiny_tokenizer: str, fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Strategy -> folder of `CausalLMModule` on a Mixtral from files: clipped, with activation checkpointing, texts."""
    parent = tmp_path_factory.mktemp("language")
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer)
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    sizes: dict[str, Any] = SIZES | {"vocab_size": len(tokenizer), "num_local_experts": EXPERTS}
    torch.manual_seed(0)
    MixtralForCausalLM(MixtralConfig(**sizes | ids)).save_pretrained(parent / "base")
    tokenizer.save_pretrained(parent / "base")

    def launched(name: str) -> Path:
        task = {"strategy": name, "model": str(parent / "base"), "data": str(fixtures / "gsm8k"), "steps": 3}
        options = {"clip": 1e-4, "checkpointing": True, "generate": True}
        launch("tests.distributed.language", [task | options | {"folder": str(parent / name)}])
        return parent / name

    return per_strategy(launched)


@pytest.mark.parametrize("name", NAMES)
def test_module_from_files_clips_recomputes_and_generates_as_under_ddp(language: Any, name: str) -> None:
    for expected, found in zip(ranks(language("ddp")), ranks(language(name)), strict=True):
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert found["metrics"]["val/loss"] == pytest.approx(expected["metrics"]["val/loss"], rel=1e-5)
        assert found["texts"][0][:2] == expected["texts"][0][:2]
        assert found["indices"] == expected["indices"]
        assert found["frozen_gradients"] == 0
    folder = language(name)
    model = AutoModelForCausalLM.from_pretrained(folder.parent / "base")
    load_adapter(model, folder / "out" / "adapter")
    moved = sum(
        float(layer.core.trained()["weight"].detach().square().sum()) for layer in adapted_layers(model).values()
    )
    assert 0.05 < moved**0.5 <= 0.3001  # three steps of lr times clip; unclipped gradients would have gone much further
    merged = MixtralForCausalLM.from_pretrained(folder / "out" / "merged")
    torch.testing.assert_close(merged(tokens()).logits, model(tokens()).logits)
