"""Singular vectors of a model on disk: the file is what `convert` computes, and converts a model without weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_pmss import CURLoRAConfig, LoRAConfig, LoRAXSConfig, PMSSConfig, convert, load_adapter, save_adapter
from lightning_pmss.cli import main
from lightning_pmss.conversion.convert import adapted_layers
from lightning_pmss.files import save_skeleton
from lightning_pmss.files.architecture import model_on_meta
from lightning_pmss.files.select import select_files
from lightning_pmss.layers.fingerprint import fingerprint
from lightning_pmss.methods.pmss.skeleton import read_skeleton
from lightning_pmss.methods.skeleton import read_derived

PARTS = {"A": 2, "B": 2}


def loaded(folder: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def steps(model: nn.Module, count: int = 3) -> list[float]:
    """Train the model for some steps."""
    ids = torch.arange(24).reshape(2, 12)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(count):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("folder", ["tiny_llama", "tiny_gpt2", "sharded_llama"])
def test_the_command_writes_what_convert_computes(
    folder: str, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    base = request.getfixturevalue(folder)
    output = tmp_path / "vectors.safetensors"
    main(["select", "--method", "lora_xs", "--model", base, "--rank", "8", "--output", str(output)])
    printed = capsys.readouterr()
    assert "computing singular vectors" in printed.err
    assert "mean residual" not in printed.out
    model = loaded(base)
    convert(model, LoRAXSConfig(rank=8))
    given = read_derived(output, "lora_xs", PARTS)
    kept = {"target_modules": "all-linear", "exclude_modules": [], "target_parameters": [], "rank_pattern": {}}
    assert given.options == {"rank": 8} | kept
    assert given.layers.keys() == adapted_layers(model).keys()
    for name, layer in adapted_layers(model).items():
        stored = given.layers[name]
        assert stored.fingerprint == fingerprint(*layer.reads())
        assert stored.tensors.keys() == PARTS.keys()
        for part, value in stored.tensors.items():
            torch.testing.assert_close(value, layer.core.frozen()[part], rtol=1e-5, atol=1e-6)
    assert save_skeleton(model, tmp_path / "live").is_file()
    live = read_derived(tmp_path / "live", "lora_xs", PARTS)
    assert live.layers.keys() == given.layers.keys()


def test_a_model_converted_from_the_file_learns_the_same(tiny_llama: str, tmp_path: Path) -> None:
    output = tmp_path / "vectors.safetensors"
    select_files(tiny_llama, output, LoRAXSConfig(rank=8, rank_pattern={"up_proj": 4}), progress=False)
    config = LoRAXSConfig(rank=8, rank_pattern={"up_proj": 4})
    expected = loaded(tiny_llama)
    convert(expected, config)
    with pytest.raises(ValueError, match=r"singular vectors need W; load the weights first or give skeleton_file="):
        convert(model_on_meta(Path(tiny_llama)), config)
    model: Any = model_on_meta(Path(tiny_llama))
    report = convert(model, LoRAXSConfig(rank=8, rank_pattern={"up_proj": 4}, skeleton_file=str(output)))
    assert {layer.rank for layer in report.layers} == {4, 8}
    given = loaded(tiny_llama)
    convert(given, LoRAXSConfig(rank=8, rank_pattern={"up_proj": 4}, skeleton_file=str(output)))
    losses = steps(given)
    assert losses == pytest.approx(steps(expected), rel=1e-5)
    assert losses[-1] < losses[0] - 0.01
    file = load_file(output)
    for name, layer in adapted_layers(given).items():
        assert all(torch.equal(value, file[f"{name}.{part}"]) for part, value in layer.core.frozen().items())
    save_adapter(given, tmp_path / "adapter")
    again = loaded(tiny_llama)
    load_adapter(again, tmp_path / "adapter")
    ids = torch.arange(12)[None]
    torch.testing.assert_close(again(ids).logits, given(ids).logits, rtol=1e-5, atol=1e-6)


def test_another_base_rank_or_method_is_refused(tiny_llama: str, tmp_path: Path) -> None:
    output = tmp_path / "vectors.safetensors"
    select_files(tiny_llama, output, LoRAXSConfig(rank=8), progress=False)
    config = LoRAXSConfig(rank=8, skeleton_file=str(output))
    model = loaded(tiny_llama)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 7] += 0.1
    with pytest.raises(
        ValueError, match=r"belongs to another base model: the weights of `model\.layers\.1\.mlp\.up_proj`"
    ):
        convert(model, config)
    with pytest.raises(
        ValueError, match=r"the A of .* is \[8, 32\], and rank 4 of this run needs \[4, 32\]; type the rank"
    ):
        convert(loaded(tiny_llama), LoRAXSConfig(rank=4, skeleton_file=str(output)))
    select_files(tiny_llama, tmp_path / "q", LoRAXSConfig(rank=8, target_modules="q_proj"), progress=False)
    with pytest.raises(ValueError, match="has no singular vectors for `model.layers.0.self_attn.k_proj`"):
        convert(loaded(tiny_llama), LoRAXSConfig(rank=8, skeleton_file=str(tmp_path / "q")))
    with pytest.raises(ValueError, match="is for lora_xs. Make one with"):
        convert(loaded(tiny_llama), PMSSConfig(rank=8, skeleton_file=str(output)))
    select_files(tiny_llama, tmp_path / "rows", PMSSConfig(rank=8), progress=False)
    with pytest.raises(ValueError, match="is not for lora_xs. Make one with .*select --method lora_xs"):
        convert(loaded(tiny_llama), LoRAXSConfig(rank=8, skeleton_file=str(tmp_path / "rows")))
    with pytest.raises(FileNotFoundError, match="does not exist; make it with"):
        convert(loaded(tiny_llama), LoRAXSConfig(skeleton_file=str(tmp_path / "none")))
    with pytest.raises(ValueError, match="LoRA derives nothing from the weights, so it needs no skeleton file"):
        select_files(tiny_llama, tmp_path / "lora", LoRAConfig(), progress=False)  # type: ignore[arg-type]


def test_damaged_files(tiny_llama: str, tmp_path: Path) -> None:
    output = tmp_path / "vectors.safetensors"
    select_files(tiny_llama, output, LoRAXSConfig(rank=8), progress=False)
    from safetensors import safe_open

    with safe_open(output, "pt") as opened:
        about = opened.metadata()
    tensors = load_file(output)
    key = sorted(tensors)[0]
    for broken, message in (
        ({k: v for k, v in tensors.items() if k != key}, "differs from its header in"),
        (tensors | {"more": tensors[key].clone()}, "differs from its header in `more`"),
        (tensors | {key: tensors[key] * float("nan")}, "NaN or infinite values"),
        (tensors | {key: tensors[key] * 2}, "checksum"),
        (tensors | {key: tensors[key].half()}, "is torch.float16"),
    ):
        save_file(broken, tmp_path / "broken", about)
        with pytest.raises(ValueError, match=message):
            read_derived(tmp_path / "broken", "lora_xs", PARTS)


def test_an_interrupted_run_goes_on(tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_pmss.methods import lora_xs

    real, calls = lora_xs.singular_factors, []

    def stopping(*args: Any) -> Any:
        calls.append(args[2])
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*args)

    output = tmp_path / "vectors.safetensors"
    monkeypatch.setattr(lora_xs, "singular_factors", stopping)
    with pytest.raises(KeyboardInterrupt):
        select_files(tiny_llama, output, LoRAXSConfig(rank=8), workers=1, progress=False)
    monkeypatch.setattr(lora_xs, "singular_factors", real)
    with pytest.raises(ValueError, match="unfinished selection with other options"):
        select_files(tiny_llama, output, PMSSConfig(rank=8), progress=False)
    report = select_files(tiny_llama, output, LoRAXSConfig(rank=8), progress=False)
    assert 4 <= report.resumed < 14
    select_files(tiny_llama, tmp_path / "whole", LoRAXSConfig(rank=8), progress=False)
    one, other = load_file(output), load_file(tmp_path / "whole")
    assert all(torch.equal(one[key], other[key]) for key in one.keys() | other.keys())


def test_options_of_another_method_are_refused(
    tiny_llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["select", "--model", tiny_llama, "--output", str(tmp_path / "s")]
    for more, message in (
        (
            ["--method", "lora_xs", "--selection", "norm", "--seed", "3"],
            "--selection, --seed: not an option of --method lora_xs",
        ),
        (["--method", "lora"], "--method lora has no skeleton; type one of pmss, lora_xs, curlora."),
        (["--method", "nothing"], "--method nothing has no skeleton; type one of pmss, lora_xs, curlora."),
    ):
        with pytest.raises(SystemExit):
            main([*command, *more])
        assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_curlora_draws_what_it_draws_in_memory(tiny_llama: str, tmp_path: Path) -> None:
    output = tmp_path / "s.safetensors"
    main(
        ["select", "--method", "curlora", "--rank", "6", "--seed", "3", "--model", tiny_llama, "--output", str(output)]
    )
    model = loaded(tiny_llama)
    convert(model, CURLoRAConfig(rank=6, seed=3))
    stored = read_skeleton(output).layers
    for name, layer in adapted_layers(model).items():
        assert torch.equal(stored[name].tensors["rows"], layer.rows)  # type: ignore[arg-type]
    meta = convert(model_on_meta(Path(tiny_llama)), CURLoRAConfig(rank=6, seed=3, skeleton_file=str(output)))
    assert len(meta.layers) == 14


def test_a_base_of_two_names(tiny_gpt2: str, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_gpt2, bare)
    tensors = load_file(bare / "model.safetensors")
    save_file(
        {k.removeprefix("transformer."): v for k, v in tensors.items()}, bare / "model.safetensors", {"format": "pt"}
    )
    for folder, name in ((tiny_gpt2, "one"), (bare, "other")):
        select_files(folder, tmp_path / name, LoRAXSConfig(rank=4), progress=False)
    one, other = load_file(tmp_path / "one"), load_file(tmp_path / "other")
    assert all(torch.equal(one[key], other[key]) for key in one.keys() | other.keys())
