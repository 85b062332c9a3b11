"""Merged models written from a live model: they load without this library and compute what it computes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_pmss.conversion.convert import adapted_layers
from lightning_pmss.files import write_merged
from lightning_pmss.merging import merge

Train = Callable[..., Any]
Logits = Callable[[nn.Module], torch.Tensor]


def _base(folder: str | Path, dtype: torch.dtype | str = "auto") -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("live_merged", [True, False])
def test_live_hugging_face_model(
    tiny_llama: str, tmp_path: Path, train: Train, logits: Logits, wrapped: bool, live_merged: bool
) -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = _base(tiny_llama)

    model = train(Wrapper() if wrapped else _base(tiny_llama))
    inner = model.inner if wrapped else model
    expected = logits(inner)
    if live_merged:
        merge(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = write_merged(model, tmp_path / "merged")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    torch.testing.assert_close(logits(_base(tmp_path / "merged")), expected, rtol=1e-4, atol=1e-5)
    AutoTokenizer.from_pretrained(tmp_path / "merged")  # from the folder the model was loaded from
    assert set(report.merged) == set(adapted_layers(model))
    keys = set(load_file(tmp_path / "merged" / "model.safetensors"))
    assert keys == set(load_file(Path(tiny_llama) / "model.safetensors"))
    with pytest.raises(FileExistsError, match="overwrite=True"):
        write_merged(model, tmp_path / "merged")
    write_merged(model, tmp_path / "merged", overwrite=True)


def test_live_conv1d_and_tokenizer(
    tiny_gpt2: str, tiny_tokenizer: str, tmp_path: Path, train: Train, logits: Logits
) -> None:
    model = train(_base(tiny_gpt2))
    write_merged(model, tmp_path / "merged", tokenizer=AutoTokenizer.from_pretrained(tiny_tokenizer))
    torch.testing.assert_close(logits(_base(tmp_path / "merged")), logits(model), rtol=1e-4, atol=1e-5)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "merged")) == 320


def test_live_model_of_any_other_kind(tmp_path: Path, train: Train) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(10, 12)
            self.norm = nn.BatchNorm1d(12)
            self.second = nn.Linear(12, 10)
            self.tied = nn.Linear(12, 10)
            self.tied.weight = nn.Parameter(self.tied.weight.detach())
            self.alias = self.tied

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.norm(self.first(x))
            return self.second(hidden) + self.alias(hidden)  # type: ignore[no-any-return]

    model = train(Net(), rank=4, target_modules=["first", "second"]).eval()
    write_merged(model, tmp_path / "merged")
    plain = Net().eval()
    plain.load_state_dict(load_file(tmp_path / "merged" / "model.safetensors"))
    x = torch.randn(7, 10)
    torch.testing.assert_close(plain(x), model(x), rtol=1e-4, atol=1e-5)


def test_live_modules_around_the_hugging_face_model(tiny_llama: str, tmp_path: Path, train: Train) -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = _base(tiny_llama)
            self.head = nn.Linear(320, 2)

    model = train(Wrapper(), also_train=["head"])
    write_merged(model, tmp_path / "merged")
    _base(tmp_path / "merged")
    assert set(load_file(tmp_path / "merged" / "other_modules.safetensors")) == {"head.weight", "head.bias"}


def test_live_output_inside_the_folder_of_the_base(tiny_llama: str, tmp_path: Path, train: Train) -> None:
    """A run started in the model's own folder must not lose its merged model at the end."""
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    model = train(_base(base))
    report = write_merged(model, base / "runs" / "merged")
    assert "tokenizer.json" in report.copied_files
    assert not [file for file in report.copied_files if "/" in file]
    write_merged(model, base / "runs" / "merged", overwrite=True)
    with pytest.raises(ValueError, match="lies inside the base"):
        write_merged(model, base / "runs" / "other", base=base)


def test_live_model_refusals(tiny_llama: str, tmp_path: Path, train: Train) -> None:
    with pytest.raises(ValueError, match="no converted layer"):
        write_merged(_base(tiny_llama), tmp_path / "merged")
    model = train(_base(tiny_llama))
    with pytest.raises(ValueError, match="is the base itself"):
        write_merged(model, tiny_llama, overwrite=True)
    model.get_submodule("model.layers.0.self_attn.q_proj").core.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="model.layers.0.self_attn.q_proj.*finite"):
        write_merged(model, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []
