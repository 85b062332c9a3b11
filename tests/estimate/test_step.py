"""The simulated step against what a real one keeps and takes, on one device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_pmss import LoRAConfig, PMSSConfig, convert
from lightning_pmss.estimate import Run, estimate, memory
from lightning_pmss.estimate.depth import estimate_step
from lightning_pmss.estimate.model import Architecture, read_config
from lightning_pmss.estimate.simulate import simulate_step
from tests.estimate.small import (
    BATCH,
    LENGTH,
    SIZES,
    allocator_peak,
    checkpoint_activations,
    forward_backward,
    kept_at_the_head,
    loss_of,
    near,
    pmss_config,
    small_model,
    write_config,
)

OPTIONS = {"micro_batch": BATCH, "sequence_length": LENGTH}


def under_autocast(loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def inner() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss()

    return inner


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "options", [{"memory": "regather"}, {"memory": "keep"}, {"columns": "all", "rank": 4}], ids=str
)
@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_bytes_kept_and_peak_of_a_step(
    precision: str, options: dict[str, Any], checkpointing: bool, tmp_path: Path
) -> None:
    config = pmss_config(**options)
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    name = str(dtype).removeprefix("torch.")
    settings = OPTIONS | {"precision": precision, "weights_dtype": name, "gradient_checkpointing": checkpointing}
    asked = Run(write_config(tmp_path), config=config, **settings)
    result = estimate(asked, ("pmss",), both=False).methods["pmss"]
    model = small_model(dtype, config)
    if checkpointing:
        checkpoint_activations(model)
    loss = loss_of(model) if precision != "bf16-mixed" else under_autocast(loss_of(model))
    trained = [p for p in model.parameters() if p.requires_grad]
    forward_backward(loss, trained)()  # caches are filled
    measured = {"peak": allocator_peak(forward_backward(loss, trained))}
    estimated = {"peak": result.activations + result.logits + result.work + result.gradients}
    if not checkpointing:
        measured["kept"], estimated["kept"] = kept_at_the_head(model, loss), result.activations
    report = near(measured, estimated)
    assert not [line for line in report if "OFF" in line], report


def test_checkpointing_keep_and_rank_are_seen(tmp_path: Path) -> None:
    """The comparison above would not notice options that change nothing."""
    folder = write_config(tmp_path)

    def kept(checkpointing: bool = False, **options: object) -> int:
        run = Run(folder, config=pmss_config(**options), gradient_checkpointing=checkpointing, **OPTIONS)
        return estimate(run, ("pmss",), both=False).methods["pmss"].activations

    usual = kept()
    assert kept(checkpointing=True) < usual / 4
    assert kept(memory="keep") > usual * 1.02
    assert kept(rank=128) > usual * 1.02


def test_deep_models_from_shallow_ones(fixtures: Path) -> None:
    config = read_config(fixtures / "architectures" / "llama-3.2-3b.json")
    config.num_hidden_layers = 9
    architecture = Architecture(config, torch.bfloat16)
    for model in (architecture.adapted(PMSSConfig(rank=64)), architecture.full()):
        layers = len(model.model.layers)  # type: ignore[union-attr, arg-type]
        for checkpointing in (False, True):
            options = {"micro_batch": 1, "sequence_length": 300, "gradient_checkpointing": checkpointing}
            found = estimate_step(architecture, model, **options)
            assert found == simulate_step(architecture, model, **options)  # type: ignore[arg-type]
        assert len(model.model.layers) == layers == 9  # type: ignore[union-attr, arg-type]


def test_layers_that_differ_are_all_played_through(tmp_path: Path) -> None:
    """Ranks that differ from layer to layer cannot be had from the first few."""
    folder = write_config(tmp_path)
    config = read_config(folder)
    config.num_hidden_layers = 8
    architecture = Architecture(config, torch.float32)
    options = {"micro_batch": 1, "sequence_length": 64, "gradient_checkpointing": False}
    pattern = PMSSConfig(rank=16, rank_pattern={r".*layers\.7\..*": 128})
    found = estimate_step(architecture, architecture.adapted(pattern), **options)
    alike = estimate_step(architecture, architecture.adapted(PMSSConfig(rank=16)), **options)
    assert found.kept == simulate_step(architecture, architecture.adapted(pattern), **options).kept  # type: ignore[arg-type]
    assert found.kept > alike.kept


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "qwen3_moe", "gpt_neox"])
def test_other_architectures(name: str) -> None:
    from transformers import AutoConfig

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128, "max_position_embeddings": 256}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32} if "moe" in name else {}
    special = {"n_embd": 64, "n_layer": 4, "n_head": 4, "vocab_size": 128}
    config = AutoConfig.for_model(name, **(special if name == "gpt2" else sizes | more | experts))
    # Experts are one grouped product, whose fake form PyTorch has in bfloat16 only.
    architecture = Architecture(config, torch.bfloat16)
    model = architecture.adapted(PMSSConfig(rank=8))
    step = estimate_step(architecture, model, micro_batch=2, sequence_length=32, gradient_checkpointing=False)
    assert 0 < step.kept <= step.head


def test_a_step_that_needs_values_is_refused() -> None:
    from transformers import LlamaConfig

    class Looks(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    architecture = Architecture(LlamaConfig(**SIZES), torch.float32)
    model = architecture.adapted(PMSSConfig(rank=8))
    model.model.norm = Looks()  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot be played through without values"):
        simulate_step(architecture, model, micro_batch=1, sequence_length=8, gradient_checkpointing=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_keeps_what_is_counted(dtype: torch.dtype, tmp_path: Path) -> None:
    rank, model = 8, small_model(dtype, None)
    convert(model, LoRAConfig(rank=rank))
    architecture = Architecture(read_config(write_config(tmp_path)), dtype)
    fake, used = architecture.lora(PMSSConfig(), rank)
    assert used == rank
    mine = sum(p.numel() for p in fake.parameters() if p.requires_grad)
    assert mine == sum(p.numel() for p in model.parameters() if p.requires_grad)
    step = simulate_step(architecture, fake, gradient_checkpointing=False, **OPTIONS)
    report = near({"kept": kept_at_the_head(model, loss_of(model))}, {"kept": step.kept})
    assert not [line for line in report if "OFF" in line], report


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_peak_on_cuda(checkpointing: bool, tmp_path: Path) -> None:
    config = pmss_config()
    options = OPTIONS | {"weights_dtype": "bfloat16", "gradient_checkpointing": checkpointing}
    result = estimate(Run(write_config(tmp_path), config=config, **options), ("pmss",), both=False).methods["pmss"]
    model = small_model(torch.bfloat16, config).cuda()
    if checkpointing:
        checkpoint_activations(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    loss = loss_of(model)
    forward_backward(loss, trained)()  # cuBLAS has its workspace from here on, which is the reserve's
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    forward_backward(loss, trained)()
    step = result.activations + result.logits + result.work + result.gradients
    report = near({"peak": torch.cuda.max_memory_allocated() - before}, {"peak": step})
    assert not [line for line in report if "OFF" in line], report


def test_a_step_is_played_through_once_for_all_strategies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    played: list[bool] = []

    def counted(*args: object, **options: object) -> object:
        played.append(bool(options["gradient_checkpointing"]))
        return estimate_step(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(memory, "estimate_step", counted)
    monkeypatch.setattr(memory, "_STEPS", {})
    (tmp_path / "other").mkdir()
    folders = write_config(tmp_path), write_config(tmp_path / "other")
    totals = [
        estimate(Run(folder, strategy, devices, config=pmss_config(), **OPTIONS), ("pmss",)).methods["pmss"].total
        for folder, strategy, devices in ((folders[0], "ddp", 2), (folders[1], "fsdp2", 4), (folders[0], "zero3", 2))
    ]
    assert played == [False, True]
    assert len(set(totals)) == 3
    for changed in ({"precision": "bf16-mixed"}, {"micro_batch": 3}, {"config": pmss_config(memory="keep")}):
        estimate(Run(folders[0], **{"config": pmss_config(), **OPTIONS, **changed}), ("pmss",), both=False)
    assert played == [False, True, False, False, False]
