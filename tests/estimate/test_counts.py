"""Parameters of the models of the paper, against counts made by hand; sizes of real files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file
from torch.utils._pytree import tree_leaves

from lightning_pmss import PMSSConfig
from lightning_pmss.checkpoints.contents import trained_shapes
from lightning_pmss.conversion.convert import conversion_of
from lightning_pmss.estimate import Run, ZeroSettings, estimate
from lightning_pmss.estimate.model import Architecture, Piece, count, decoder_blocks, inventory, read_config
from lightning_pmss.estimate.strategies import host_bytes, place
from lightning_pmss.files import save_adapter
from lightning_pmss.methods.pmss.config import COORDINATES
from tests.estimate.small import loss_of, pmss_config, small_model, write_config

QV = ["q_proj", "v_proj"]
# model, parameters, targets, rank, trained: rank^2 per layer, clipped to the layer (written out by hand)
COUNTS: list[tuple[str, int, Any, int, int]] = [
    ("llama-2-7b", 6_738_415_616, QV, 128, 64 * 128**2),
    ("llama-2-7b", 6_738_415_616, "all-linear", 256, 224 * 256**2),
    ("llama-2-13b", 13_015_864_320, QV, 512, 80 * 512**2),
    ("llama-2-13b", 13_015_864_320, "all-linear", 256, 280 * 256**2),
    ("llama-2-13b", 13_015_864_320, "all-linear", 512, 280 * 512**2),
    ("llama-2-13b", 13_015_864_320, "all-linear", 1024, 280 * 1024**2),
    ("mistral-7b", 7_241_732_096, "all-linear", 1024, 224 * 1024**2),
    ("mistral-7b", 7_241_732_096, "all-linear", 2048, 160 * 2048**2 + 64 * 1024**2),
    ("gemma-7b", 8_537_680_896, "all-linear", 1024, 196 * 1024**2),
    ("llama-3.2-3b", 3_212_749_824, "all-linear", 512, 196 * 512**2),
]


@pytest.mark.parametrize(("name", "parameters", "targets", "rank", "trained"), COUNTS)
def test_parameters(name: str, parameters: int, targets: Any, rank: int, trained: int, fixtures: Path) -> None:
    config = read_config(fixtures / "architectures" / f"{name}.json")
    pieces = inventory(Architecture(config, torch.bfloat16).adapted(PMSSConfig(target_modules=targets, rank=rank)))
    numbers = count(pieces)
    assert numbers["base"] == parameters
    assert numbers["trained"] == trained
    assert numbers["factor"] == 2 * trained


def test_lora_at_equal_parameters(fixtures: Path) -> None:
    """On square layers of side h, rank r of PMSS has the parameters of LoRA's r^2 / 2h."""
    config = read_config(fixtures / "architectures" / "llama-2-7b.json")
    architecture = Architecture(config, torch.bfloat16)
    for rank, lora in ((256, 8), (512, 32), (1024, 128)):
        model, found = architecture.lora(PMSSConfig(target_modules=QV, rank=rank))
        assert found == lora
        assert count(inventory(model))["trained"] == 64 * rank**2
    everything, _ = architecture.lora(PMSSConfig(), 32)
    assert count(inventory(everything))["trained"] == 32 * 32 * (4 * 8192 + 3 * 15104)


def test_decoder_blocks(fixtures: Path) -> None:
    config = read_config(fixtures / "architectures" / "gemma-7b.json")
    model = Architecture(config, torch.bfloat16).base()
    assert decoder_blocks(model) == [f"model.layers.{i}" for i in range(28)]
    plain = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(3)])})
    assert decoder_blocks(plain) == ["blocks.0", "blocks.1", "blocks.2"]


@pytest.mark.parametrize("options", [*({"coordinates": name} for name in COORDINATES), {"columns": "all"}], ids=str)
def test_adapter_and_checkpoint_files(tmp_path: Path, options: dict[str, str]) -> None:
    config = pmss_config(**options)
    run = Run(write_config(tmp_path), config=config, sequence_length=32, weights_dtype="float32", precision="32-true")
    found = estimate(run, ("pmss",), both=False).methods["pmss"]

    model = small_model(torch.float32, config)
    file = save_adapter(model, tmp_path / "adapter") / "adapter_model.safetensors"
    assert sum(tensor.nbytes for tensor in load_file(file).values()) == found.adapter
    assert found.adapter == pytest.approx(file.stat().st_size, rel=0.1)
    assert found.adapter == conversion_of(model).adapter_bytes  # type: ignore[union-attr]

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    loss_of(model)().backward()
    optimizer.step()
    module = L.LightningModule()
    module.model = model
    kept = trained_shapes(module)
    record = {
        "state_dict": {k: v for k, v in module.state_dict().items() if k in kept},
        "optimizer": optimizer.state_dict(),
    }
    tensors = [leaf for leaf in tree_leaves(record) if isinstance(leaf, torch.Tensor)]
    assert found.checkpoint == pytest.approx(sum(tensor.nbytes for tensor in tensors), rel=0.01)
    torch.save(record, tmp_path / "saved.ckpt")
    around = 2000 * len(tensors)  # the format's own bytes, which count in a small model only
    assert found.checkpoint < (tmp_path / "saved.ckpt").stat().st_size < found.checkpoint + around


def test_adapter_file_with_a_head_in_bfloat16(tmp_path: Path) -> None:
    """What is trained in full is stored in its own dtype, U in float32."""
    config = pmss_config(also_train=["lm_head"])
    run = Run(write_config(tmp_path), config=config, sequence_length=32, weights_dtype="bfloat16")
    found = estimate(run, ("pmss",), both=False)
    model = small_model(torch.bfloat16, config)
    file = save_adapter(model, tmp_path / "adapter") / "adapter_model.safetensors"
    assert sum(tensor.nbytes for tensor in load_file(file).values()) == found.methods["pmss"].adapter


PIECES = [
    Piece("embed", (10, 4), 2, "base", ""),
    Piece("a.w", (6, 4), 2, "base", "a"),
    Piece("a.core.weight", (4, 4), 4, "trained", "a"),
    Piece("a.core.frame.left", (4, 4), 4, "factor", "a"),
    Piece("a.rows", (4,), 8, "index", "a", buffer=True),
]


def test_placement_by_hand() -> None:
    alone = place(PIECES, "single", 1)
    assert (alone.base, alone.trained, alone.factors, alone.gradients, alone.optimizer) == (128, 96, 64, 64, 128)
    assert (alone.gathered, alone.buckets, alone.offloaded) == (0, 0, 0)
    assert place(PIECES, "ddp", 2).buckets == 64
    assert place(PIECES, "single", 1, "sgd").optimizer == 0
    rows = place(PIECES, "fsdp2", 3)  # shares of 4, 2, 2 and 2 rows
    assert (rows.base, rows.trained, rows.factors, rows.gradients, rows.optimizer) == (48, 64, 32, 32, 64)
    assert rows.gathered == 80 + 2 * (48 + 64 + 64) + 2 * 64
    flat = place(PIECES, "fsdp", 3)
    assert (flat.base, flat.trained) == ((14 + 8) * 2, 6 * 4 + 32)
    assert flat.gathered == 80 + 2 * 48 + 2 * (2 * 64 + 64)
    zero2 = place(PIECES, "zero2", 2, settings=ZeroSettings(bucket=5))
    assert (zero2.base, zero2.trained, zero2.gradients, zero2.optimizer) == (128, 96, 32, 8 * 8 + 8 * 4)
    assert zero2.buckets == 2 * 5 * 4
    zero3 = place(PIECES, "zero3", 2, settings=ZeroSettings(bucket=5, persistence=16, live=50))
    assert (zero3.base, zero3.trained, zero3.optimizer, zero3.buckets) == (64, 64, 96, 20)
    assert zero3.gathered == 64 + 64 + 50 * 4  # two matrices of 16 stay whole; at most 50 of the other 64
    away = place(PIECES, "zero3_offload", 2, settings=ZeroSettings(bucket=5, persistence=16, live=50))
    assert (away.base, away.trained, away.gradients, away.optimizer) == (0, 32, 0, 0)
    assert away.offloaded == 64 + 32 + 32 + 96 + 32
    assert host_bytes(1000, away, "zero3_offload", 2) == 2 * (2_000_000_000 + 256) + 1000
    assert host_bytes(1000, alone, "ddp", 4) == 4 * (2_000_000_000 + 1000)
