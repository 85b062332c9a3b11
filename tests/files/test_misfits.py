"""Tensors trained in full that cannot be the model's: other kinds of numbers, too large, or unproven."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_pmss import load_adapter, save_adapter
from lightning_pmss.conversion.convert import adapted_layers
from lightning_pmss.files.lora import export_files
from lightning_pmss.files.merged import merge_files
from lightning_pmss.named import add_adapter, load_adapters
from lightning_pmss.store import read_json
from lightning_pmss.store.tensors import open_tensors
from tests.files.edits import WEIGHTS, data_begins, edit_config, edit_tensors, flip, seal

Train = Callable[..., nn.Module]


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 4))


@pytest.fixture
def adapter(tmp_path: Path, train: Train) -> Path:
    save_file(_net().state_dict(), tmp_path / "base.safetensors")
    return save_adapter(train(_net(), rank=3, also_train=["2"]), tmp_path / "adapter")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.long(), "is torch.int64, and the model's is torch.float32"),
        (lambda v: v.bool(), "is torch.bool, and the model's is torch.float32"),
        (lambda v: v.to(torch.complex64), "is torch.complex64, and the model's is torch.float32"),
        (
            lambda v: torch.full_like(v, 1e300, dtype=torch.float64),
            "is torch.float64 and too large for torch.float32, the model's",
        ),
    ],
)
def test_wherever_it_is_given(adapter: Path, tmp_path: Path, train: Train, change: Any, message: str) -> None:
    """`copy_` and `to` take all of these: an imaginary part, or infinity, got lost without a word."""
    good = save_adapter(train(_net(), rank=3, also_train=["2"], seed=1), tmp_path / "good")
    edit_tensors(adapter, lambda tensors: tensors.update({"2.weight": change(tensors["2.weight"])}))
    seal(adapter)
    fresh, several, output = _net(), _net(), tmp_path / "output"
    load_adapters(several, {"good": good})
    acts: list[Callable[[], Any]] = [
        lambda: load_adapter(fresh, adapter),
        lambda: load_adapters(fresh, {"a": adapter}),
        lambda: add_adapter(several, "bad", adapter),
        lambda: merge_files(tmp_path / "base.safetensors", adapter, output, progress=False),
        lambda: export_files(tmp_path / "base.safetensors", adapter, output, progress=False),
    ]
    for act in acts:
        with pytest.raises(ValueError, match=f"{adapter}: 2.weight {message}"):
            act()
    assert not adapted_layers(fresh)
    assert not output.exists()


def test_a_dtype_that_cannot_hold_the_rest_of_the_base(adapter: Path, tmp_path: Path) -> None:
    """Not of a converted layer, of which this was known."""
    state = {key: value.clone() for key, value in load_file(tmp_path / "base.safetensors").items()}
    state["0.bias"][3] = 1e6
    save_file(state, tmp_path / "large.safetensors")
    with pytest.raises(ValueError, match="0.bias is too large for torch.float16; nothing is written"):
        merge_files(tmp_path / "large.safetensors", adapter, tmp_path / "output", dtype="float16", progress=False)
    assert not (tmp_path / "output").exists()
    merge_files(tmp_path / "large.safetensors", adapter, tmp_path / "output", dtype="bfloat16", progress=False)


def test_checksums_count_whatever_the_number_of_the_format(adapter: Path) -> None:
    edit_config(adapter, lambda config: config.update(format_version=1))
    load_adapter(_net(), adapter)
    flip(adapter / WEIGHTS, data_begins(adapter / WEIGHTS) + 5, 0)
    with pytest.raises(ValueError, match="changed after the file was written"):
        load_adapter(_net(), adapter)


def test_a_size_that_no_tensor_has(adapter: Path, tmp_path: Path) -> None:
    edit_config(adapter, lambda config: config.update(settings={"vocab_size": 99}))
    with pytest.raises(ValueError, match=r"no tensor of the merged model has the size in its settings \(vocab_size\)"):
        merge_files(tmp_path / "base.safetensors", adapter, tmp_path / "output", progress=False)
    assert not (tmp_path / "output").exists()


def test_the_pointer_of_git_lfs(tmp_path: Path) -> None:
    """It was called a truncated file, and the remedy was to copy it again."""
    file = tmp_path / "x"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    for read in (lambda: open_tensors(file, "Do."), lambda: read_json(file, "Do.")):
        with pytest.raises(ValueError, match=f"{file} is a pointer of Git LFS .* Type `git lfs pull`"):
            read()
