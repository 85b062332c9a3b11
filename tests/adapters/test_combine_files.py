"""``combine``: adapters of several methods and ranks become one LoRA adapter, which merges and trains on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_pmss import HiRAConfig, LoRAConfig, MiSSConfig, PMSSConfig, convert, load_adapter, merge, save_adapter
from lightning_pmss.cli.tools import run_tool
from lightning_pmss.conversion.convert import adapted_layers
from lightning_pmss.named import combine_files
from lightning_pmss.named.rules import RULES
from tests.adapters.conftest import logits

Write = Callable[..., Path]


@pytest.fixture
def write(fresh: Callable[..., Any], tmp_path: Path) -> Write:
    def written(name: str, config: Any, seed: int = 1, size: float = 0.3) -> Path:
        model = fresh()
        convert(model, config)
        generator = torch.Generator().manual_seed(seed)
        for layer in adapted_layers(model).values():
            for value in layer.core.trained().values():
                value.data = size * torch.randn(value.shape, generator=generator)
        save_adapter(model, tmp_path / name, overwrite=True)
        return tmp_path / name

    return written


def weights(model: Any) -> dict[str, Tensor]:
    return {
        name: p.detach().clone() for name, p in model.named_parameters() if name.endswith("weight") and p.dim() == 2
    }


def merged_weights(fresh: Callable[..., Any], folder: Path) -> dict[str, Tensor]:
    model = fresh()
    load_adapter(model, folder)
    merge(model)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_the_sum_of_three_methods_is_exact(base: str, fresh: Any, write: Write, tmp_path: Path) -> None:
    folders = [write("p", PMSSConfig(rank=6)), write("l", LoRAConfig(rank=3), 2), write("m", MiSSConfig(rank=4), 3)]
    report = combine_files(base, folders, tmp_path / "sum", rule="cat", weights=[0.5, -1.0, 2.0], progress=False)
    start = weights(fresh())
    parts = [merged_weights(fresh, folder) for folder in folders]
    found = merged_weights(fresh, tmp_path / "sum")
    changed = 0
    for name, value in start.items():
        expected = value + sum(w * (part[name] - value) for w, part in zip((0.5, -1.0, 2.0), parts, strict=True))
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5)
        changed += not torch.equal(found[name], value)
    assert changed == len(report.ranks) == 8
    assert set(report.ranks.values()) == {6 + 3 + 4}


def test_lego_reports_what_survives_and_trains_on(base: str, fresh: Any, write: Write, tmp_path: Path) -> None:
    folders = [write("a", LoRAConfig(rank=4)), write("b", PMSSConfig(rank=6), 2)]
    report = combine_files(base, folders, tmp_path / "lego", rule="lego", rank=5, progress=False)
    assert set(report.ranks.values()) == {5}
    own, total = merged_weights(fresh, folders[0]), merged_weights(fresh, tmp_path / "lego")
    start = weights(fresh())
    delta = torch.cat([(own[n] - v).flatten() for n, v in start.items()])
    whole = torch.cat([(total[n] - v).flatten() for n, v in start.items()])
    first = report.sources[0]
    assert first.norm == pytest.approx(float(delta.norm()), rel=1e-4)
    assert first.cosine == pytest.approx(float(torch.cosine_similarity(delta, whole, 0)), abs=1e-4)
    assert first.share == pytest.approx(float(delta @ whole / delta.square().sum()), abs=1e-4)
    assert first.lowest[0] in report.ranks
    model = fresh()
    load_adapter(model, tmp_path / "lego")
    model.train()(input_ids=torch.arange(1, 21).reshape(2, 10)).logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_layers_that_only_one_adapter_has(base: str, fresh: Any, write: Write, tmp_path: Path) -> None:
    some = write("some", LoRAConfig(rank=3, target_modules=["c_attn"]))
    every = write("every", LoRAConfig(rank=3), 2)
    report = combine_files(base, [some, every], tmp_path / "both", rule="svd", rank=3, progress=False)
    assert [source.layers for source in report.sources] == [2, 8]
    found, alone = merged_weights(fresh, tmp_path / "both"), merged_weights(fresh, every)
    torch.testing.assert_close(found["transformer.h.0.mlp.c_fc.weight"], alone["transformer.h.0.mlp.c_fc.weight"])


def test_command_line(base: str, fresh: Any, write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(write("a", LoRAConfig(rank=4))), str(write("b", LoRAConfig(rank=4), 2))]
    words = ["--base", base, "--adapters", *folders, "--output", str(tmp_path / "out")]
    run_tool("combine", *words, "--rule", "ties", "--density", "0.5", "--weights", "1", "0.5")
    printed = capsys.readouterr().out
    assert "LoRA of rank 4 at most, 8 layers, by ties" in printed
    assert "share  cosine  lowest cosine" in printed
    model = fresh()
    load_adapter(model, tmp_path / "out")
    assert not torch.equal(logits(model), logits(fresh()))
    with pytest.raises(SystemExit):
        run_tool("combine", "--help")
    shown = capsys.readouterr().out
    assert [rule for rule in RULES if rule not in shown] == []
    with pytest.raises(SystemExit) as stop:
        run_tool("combine", *words, "--rule", "cat")
    assert stop.value.code == 2
    assert "--overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapters": 1}, "give at least two adapter folders"),
        ({"weights": [1.0]}, r"weights=\[1.0\]: give one number per adapter; there are 2"),
        ({"weights": [1.0, 0.0]}, "must be a finite number other than 0; leave an adapter out"),
        ({"rule": "lego"}, "rule lego needs a rank"),
    ],
)
def test_refusals_before_any_work(
    base: str, write: Write, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    folders = [write("a", LoRAConfig(rank=4)), write("b", LoRAConfig(rank=4), 2)][: options.pop("adapters", 2)]
    with pytest.raises(ValueError, match=message):
        combine_files(base, folders, tmp_path / "out", **{"rule": "cat", "progress": False} | options)
    assert not (tmp_path / "out").exists()


def test_updates_and_bases_that_do_not_fit(base: str, write: Write, tmp_path: Path) -> None:
    lora, hira = write("a", LoRAConfig(rank=4)), write("h", HiRAConfig(rank=2), 2)
    with pytest.raises(ValueError, match="is no product of two thin matrices"):
        combine_files(base, [lora, hira], tmp_path / "out", rule="cat", progress=False)
    with pytest.raises(ValueError, match="is no product of two thin matrices"):
        combine_files(base, [lora, hira], tmp_path / "out", rule="lego", rank=4, progress=False)
    combine_files(base, [lora, hira], tmp_path / "cut", rule="svd", rank=4, progress=False)
    head = write("head", LoRAConfig(rank=4, also_train=["ln_f"]), 3)
    with pytest.raises(ValueError, match="trained in full or fresh, of which a combination means nothing"):
        combine_files(base, [lora, head], tmp_path / "out", rule="cat", progress=False)
    q, mlp = (write(t, LoRAConfig(rank=2, target_modules=[t])) for t in ("c_attn", "c_fc"))
    with pytest.raises(ValueError, match="have no layer in common"):
        combine_files(base, [q, mlp], tmp_path / "out", rule="cat", progress=False)
    pmss = write("p", PMSSConfig(rank=4))
    other = tmp_path / "other"
    shutil.copytree(base, other)
    from safetensors.torch import load_file, save_file

    tensors = load_file(other / "model.safetensors")
    save_file(
        {k: v + 0.1 if v.dim() == 2 else v for k, v in tensors.items()}, other / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match="belongs to another base"):
        combine_files(other, [lora, pmss], tmp_path / "out", rule="cat", progress=False)
    assert not (tmp_path / "out").exists()
