"""``python -m lightning_pmss export``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_pmss.cli import main
from lightning_pmss.conversion.convert import adapted_layers, convert
from lightning_pmss.files import export_lora, merge_files, save_adapter
from lightning_pmss.merging import merge
from lightning_pmss.methods.pmss.config import PMSSConfig
from tests import forks

REPOSITORY = Path(__file__).resolve().parents[2]


def _model(folder: str) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    convert(model, PMSSConfig(rank=20))
    generator = torch.Generator().manual_seed(0)
    for layer in adapted_layers(model).values():
        layer.core.weight.data.copy_(torch.randn(layer.core.weight.shape, generator=generator))
    return model


@pytest.fixture
def adapter(tiny_llama: str, tmp_path: Path) -> Path:
    return save_adapter(_model(tiny_llama), tmp_path / "adapter")


def _command(base: str | Path, adapter: Path, output: Path, *more: str) -> list[str]:
    given = ["--base", str(base), "--adapter", str(adapter), "--output", str(output)]
    return ["export", "--format", "peft", *given, *more]


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_says_size_and_flag(tiny_llama: str, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(_command(tiny_llama, adapter, tmp_path / "lora"))
    lines = capsys.readouterr().out.splitlines()
    size = json.loads((tmp_path / "lora" / "export_report.json").read_text())["bytes"]
    assert lines[0] == (
        f"LoRA of 14 layers (10 of rank 20, 4 of rank 16; exact): {size / 1000:.3g} KB in float32, to {tmp_path / 'lora'}"
    )
    assert lines[1] == f"wrote {size / 1000:.3g} KB to {tmp_path / 'lora'}. vLLM needs --max-lora-rank 32."


def test_every_option_reaches_the_file(tiny_llama: str, adapter: Path, tmp_path: Path) -> None:
    main(_command(tiny_llama, adapter, tmp_path / "lora"))
    main(_command(tiny_llama, adapter, tmp_path / "lora", "--overwrite", "--rank", "8", "--dtype", "bfloat16"))
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert {tensor.shape[0] for key, tensor in tensors.items() if "lora_A" in key} == {8}
    report = json.loads((tmp_path / "lora" / "export_report.json").read_text())
    assert len(report["errors"]) == 14
    assert sorted(report["files"]) == sorted(path.name for path in (tmp_path / "lora").iterdir())


def test_refusals_are_one_line(
    tiny_llama: str, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, none = tmp_path / "lora", tmp_path / "none"
    merged = merge_files(tiny_llama, adapter, tmp_path / "merged", progress=False).output
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    for args, message in (
        (_command(none, adapter, output), f"{none} is not a folder"),
        (_command(tiny_llama, none, output), f"{none} is not a folder"),
        (_command(merged, adapter, output), "belongs to another base"),
        (_command(tiny_llama, adapter, output, "--rank", "0"), "rank=0 is not a rank"),
        (_command(tiny_llama, adapter, output, "--dtype", "int8"), "dtype='int8': write float32"),
        (_command(tiny_llama, adapter, tmp_path / "full"), "give --overwrite"),
        (_command(tiny_llama, adapter, tmp_path / "full", "--overwrite"), "did not write (mine.txt)"),
        (_command(tiny_llama, adapter, adapter), "is the adapter itself"),
        (_command(tiny_llama, adapter, adapter / "lora"), "lies inside the adapter"),
    ):
        error = refused(capsys, *args)
        assert error.startswith("python -m lightning_pmss export: error: ")
        assert message in error
        assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "full", "merged"]


def test_unknown_format_names_the_known(
    tiny_llama: str, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = _command(tiny_llama, adapter, tmp_path / "lora")
    args[args.index("peft")] = "gguf"
    assert "format='gguf' is not known; choose peft" in refused(capsys, *args)


def test_another_base_is_named_layer_by_layer(
    tiny_llama: str, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    state = load_file(base / "model.safetensors")
    state["model.layers.1.mlp.down_proj.weight"] *= 1.0001
    save_file(state, base / "model.safetensors", {"format": "pt"})
    error = refused(capsys, *_command(base, adapter, tmp_path / "lora"))
    assert "the weights of model.layers.1.mlp.down_proj in" in error
    assert not (tmp_path / "lora").exists()


def test_live_refusals(tiny_llama: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    with pytest.raises(ValueError, match="LlamaForCausalLM has no converted layer to export. Call convert or load"):
        export_lora(AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path / "lora")
    model = _model(tiny_llama)
    with pytest.raises(ValueError, match="rank=8.5 is not a rank"):
        export_lora(model, tmp_path / "lora", rank=8.5)  # type: ignore[arg-type]
    adapted_layers(model)["model.layers.0.mlp.up_proj"].core.weight.data.mul_(1e6)
    with pytest.raises(ValueError, match="update is too large for this dtype"):
        export_lora(model, tmp_path / "lora", dtype="float16", progress=False)
    adapted_layers(model)["model.layers.0.mlp.up_proj"].core.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"NaN or infinite values in model.layers.0.mlp.up_proj.U"):
        export_lora(model, tmp_path / "lora", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_merged_model_exports_its_adapter(tiny_llama: str, tmp_path: Path) -> None:
    model = _model(tiny_llama)
    export_lora(model, tmp_path / "before", progress=False)
    merge(model)
    export_lora(model, tmp_path / "after", progress=False)
    one, other = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("before", "after"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_as_a_program(tiny_llama: str, adapter: Path, tmp_path: Path) -> None:
    command = ["-m", "lightning_pmss", *_command(tiny_llama, adapter, tmp_path / "lora")]
    for code, says in ((0, "--max-lora-rank 32"), (2, "give --overwrite")):
        result = forks.run(command)
        assert result.returncode == code, result.stderr
        assert says in result.stdout + result.stderr
        assert "Traceback" not in result.stderr
