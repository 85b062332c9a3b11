"""What peft lets through, row by row, and what converting, loading, merging and exporting say to it here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lightning_pmss.cli import main
from lightning_pmss.conversion.convert import adapted_layers, conversion_of, convert
from lightning_pmss.files import export_files, export_lora, load_adapter, merge_files, save_adapter
from lightning_pmss.inspect.inspection import inspect_adapter
from lightning_pmss.merging import merge, unmerge
from lightning_pmss.methods.pmss.config import PMSSConfig

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


def _base(folder: str | Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture
def adapter(tiny_llama: str, tmp_path: Path, train: Any) -> Path:
    return save_adapter(train(_base(tiny_llama)), tmp_path / "adapter")


def _ways(adapter: Path, base: str | Path, tmp_path: Path) -> dict[str, Callable[[], Any]]:
    """Everything that reads an adapter with its base."""
    output = tmp_path / "output"
    return {
        "load": lambda: load_adapter(_base(base), adapter),
        "merge": lambda: merge_files(base, adapter, output, progress=False),
        "export": lambda: export_files(base, adapter, output, progress=False),
        "inspect": lambda: inspect_adapter(adapter, base),
    }


def _refused_everywhere(
    adapter: Path, base: str | Path, tmp_path: Path, message: str, error: type[Exception] = ValueError
) -> None:
    """By all four, with this message, and nothing is left behind."""
    before = sorted(path.name for path in tmp_path.iterdir())
    for way, act in _ways(adapter, base, tmp_path).items():
        with pytest.raises(error, match=message) as caught:
            act()
        assert type(caught.value) is error, way
        assert sorted(path.name for path in tmp_path.iterdir()) == before, way


def _edit(adapter: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def _all_work(adapter: Path, base: str, tmp_path: Path) -> None:
    for way, act in _ways(adapter, base, tmp_path).items():
        act()
        if way in ("merge", "export"):
            shutil.rmtree(tmp_path / "output")


def test_the_sound_adapter_is_taken(tiny_llama: str, adapter: Path, tmp_path: Path) -> None:
    """Else every refusal below would prove nothing."""
    _all_work(adapter, tiny_llama, tmp_path)


def test_row_1_a_typo_among_the_targets(tiny_llama: str) -> None:
    model = _base(tiny_llama)
    with pytest.raises(ValueError, match=r"target_modules: 'v_prj' matches no module; closest names: .*v_proj"):
        convert(model, PMSSConfig(target_modules=["q_proj", "v_prj"], rank=4))
    for field in ("exclude_modules", "also_train"):
        with pytest.raises(ValueError, match=f"{field}: 'v_prj' matches no module"):
            convert(model, PMSSConfig(rank=4, **{field: ["v_prj"]}))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rank_pattern: 'v_prj' matches no module"):
        convert(model, PMSSConfig(rank=4, rank_pattern={"v_prj": 2}))
    assert not adapted_layers(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_row_2_a_rank_above_the_layer(tmp_path: Path, train: Any) -> None:
    """peft: 131,072 parameters for 8,192 weights. Here the rank is clipped, the report says so, and so is the LoRA."""
    model = train(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32)), rank=512)
    report = conversion_of(model)
    assert report is not None
    assert [(layer.rank, layer.requested_rank) for layer in report.layers] == [(64, 512), (32, 512)]
    assert "64 (asked 512)" in str(report)
    assert report.trainable == 64 * 64 + 32 * 32
    exported = export_lora(model, tmp_path / "lora", progress=False)
    assert [layer.rank for layer in exported.layers] == [64, 32]


def test_row_3_such_a_layer_computes() -> None:
    """PSOFT builds it and dies in the first forward pass."""
    model = nn.Sequential(nn.Linear(64, 64))
    convert(model, PMSSConfig(rank=512))
    model(torch.randn(4, 64)).square().sum().backward()
    gradient = model[0].core.weight.grad
    assert isinstance(gradient, torch.Tensor)
    assert gradient.shape == (64, 64)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("rank", [8.5, 0, -1, True, "8", None])
def test_row_4_a_rank_that_is_none(
    rank: Any, tiny_llama: str, adapter: Path, tmp_path: Path, train: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=r"rank=.* is not a rank; type a whole number of at least 1"):
        PMSSConfig(rank=rank)
    with pytest.raises(ValueError, match=r"rank_pattern\['q_proj'\]=.* is not a rank"):
        PMSSConfig(rank_pattern={"q_proj": rank})
    if rank is None:
        return  # to the export it means: exact
    with pytest.raises(ValueError, match=r"rank=.* is not a rank; type a whole number"):
        export_files(tiny_llama, adapter, tmp_path / "output", rank=rank)
    with pytest.raises(ValueError, match=r"rank=.* is not a rank; type a whole number"):
        export_lora(train(_base(tiny_llama)), tmp_path / "output", rank=rank)
    command = ["export", "--format", "peft", "--base", tiny_llama, "--adapter", str(adapter), "--output"]
    if rank in (8.5, 0, -1):
        with pytest.raises(SystemExit):
            main([*command, str(tmp_path / "output"), f"--rank={rank}"])
        assert "rank" in capsys.readouterr().err
    assert not (tmp_path / "output").exists()


def test_row_5_a_base_with_other_weights(tiny_llama: str, adapter: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    torch.manual_seed(5)
    LlamaForCausalLM(LlamaConfig.from_pretrained(tiny_llama)).save_pretrained(other)
    _refused_everywhere(
        adapter, other, tmp_path, rf"{adapter} belongs to another base: the weights of .*{Q}.* and 11 more"
    )


def test_row_6_a_key_missing_and_a_foreign_one(tiny_llama: str, adapter: Path, tmp_path: Path) -> None:
    _edit(adapter, lambda tensors: tensors.update(lora_A=tensors.pop(f"{Q}.U")))
    message = rf"lacks {Q}\.U and has lora_A, which adapter_config.json does not list"
    _refused_everywhere(adapter, tiny_llama, tmp_path, message)


def test_row_7_a_base_of_another_width(tiny_llama: str, adapter: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    config = LlamaConfig.from_pretrained(tiny_llama)
    config.hidden_size, config.head_dim = 48, 12
    LlamaForCausalLM(config).save_pretrained(other)
    # One line, the first layer by its name and both shapes, not a dump key by key.
    message = (
        r"^[^\n]*model\.layers[^\n]*(\[32, 32\]|32, 32)[^\n]*48[^\n]*$|^[^\n]*48[^\n]*was trained on \[32, 32\][^\n]*$"
    )
    _refused_everywhere(adapter, other, tmp_path, message)


@pytest.mark.parametrize("keep", [0, 5, 1000, -3])
@pytest.mark.parametrize("which", ["adapter_model.safetensors", "model.safetensors"])
def test_row_8_a_truncated_file(which: str, keep: int, tiny_llama: str, adapter: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    file = (adapter if "adapter" in which else base) / which
    file.write_bytes(file.read_bytes()[:keep])
    ways = _ways(adapter, base, tmp_path)
    if which == "model.safetensors":
        del ways["load"]  # there it is transformers that reads the base
    for act in ways.values():
        with pytest.raises(ValueError, match=rf"{file} is not a complete safetensors file"):
            act()
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_row_9_nan_in_the_adapter(
    value: float, tiny_llama: str, adapter: Path, tmp_path: Path, train: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    _edit(adapter, lambda tensors: tensors[f"{Q}.U"][0].fill_(value))
    _refused_everywhere(adapter, tiny_llama, tmp_path, f"NaN or infinite values in {Q}.U")
    model = train(_base(tiny_llama))
    adapted_layers(model)[Q].core.weight.data[0, 0] = value
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=f"`{Q}`: U holds NaN or infinite values; the run diverged. Nothing was merged"
    ):
        merge(model)
    for act in (save_adapter, export_lora):
        with pytest.raises(ValueError, match=f"NaN or infinite values in {Q}.U"):
            act(model, tmp_path / "output")
    assert all(torch.equal(tensor, before[key]) or key.startswith(Q) for key, tensor in model.state_dict().items())
    assert not (tmp_path / "output").exists()


def test_row_10_training_while_merged(tiny_llama: str, train: Any) -> None:
    """Also where something else would train on alone, which torch itself would not notice."""
    ids = torch.arange(1, 11).reshape(1, 10)
    model = train(_base(tiny_llama)).train()
    merge(model)
    with pytest.raises(RuntimeError, match=r"the model is merged, so U has no effect.*Call unmerge\(model\)"):
        model(input_ids=ids, labels=ids).loss.backward()
    model.model.norm.weight.requires_grad_(True)
    model.model.embed_tokens.weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match="the model is merged"):
        model(input_ids=ids, labels=ids).loss.backward()
    with torch.no_grad():
        model(input_ids=ids)
    model.eval()(input_ids=ids, labels=ids).loss.backward()  # of the merged model itself, as for an attribution
    unmerge(model)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert adapted_layers(model)[Q].core.weight.grad.abs().sum() > 0


def test_row_10_an_activation_in_place_may_follow_a_merged_layer() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 6))
    convert(model, PMSSConfig(rank=3, edit="input"))
    merge(model)
    x = torch.randn(4, 6)
    with torch.no_grad():
        expected = model(x)
    assert torch.equal(model(x), expected)


def test_row_11_converting_twice(tiny_llama: str, adapter: Path) -> None:
    """peft nests its models. Here the same once more changes nothing, and anything else is refused."""
    model = _base(tiny_llama)
    report = convert(model, PMSSConfig(rank=6))
    before = [name for name, _ in model.named_modules()]
    assert convert(model, PMSSConfig(rank=6)) is report
    with pytest.raises(ValueError, match=r"already converted with another config \(differs in rank\).*fresh model"):
        convert(model, PMSSConfig(rank=5))
    load_adapter(model, adapter)
    load_adapter(model, adapter)
    assert [name for name, _ in model.named_modules()] == before


def test_row_12_an_empty_folder(tiny_llama: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    message = "empty lacks adapter_config.json and adapter_model.safetensors: not a complete adapter folder"
    _refused_everywhere(tmp_path / "empty", tiny_llama, tmp_path, message, FileNotFoundError)


def test_an_empty_base(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    ways = _ways(adapter, tmp_path / "empty", tmp_path)
    for way in ("merge", "export", "inspect"):
        with pytest.raises(
            FileNotFoundError, match=r"empty holds neither model.safetensors nor model.safetensors.index"
        ):
            ways[way]()


def test_an_adapter_of_another_architecture(tiny_gpt2: str, adapter: Path, tmp_path: Path) -> None:
    message = rf"(layers that the model does not have|has no weights for 14 of the 14 modules).*{Q}"
    _refused_everywhere(adapter, tiny_gpt2, tmp_path, message)


def test_a_format_of_a_newer_version(tiny_llama: str, adapter: Path, tmp_path: Path) -> None:
    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"format_version": 3, "versions": {"lightning-pmss": "9.0"}}))
    message = rf"{file} has format version 3, and this lightning-pmss reads up to 2: upgrade it.*9\.0"
    _refused_everywhere(adapter, tiny_llama, tmp_path, message)


def test_a_base_whose_files_changed_since(tiny_llama: str, tmp_path: Path, train: Any) -> None:
    """One weight of one layer, by one part in ten thousand, in the folder that the adapter names."""
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    model = train(_base(base))
    adapter = save_adapter(model, tmp_path / "adapter")
    _all_work(adapter, str(base), tmp_path)
    state = load_file(base / "model.safetensors")
    row = int(adapted_layers(model)[DOWN].rows[0])
    state[f"{DOWN}.weight"][row, 0] *= 1.0001
    save_file(state, base / "model.safetensors", {"format": "pt"})
    message = rf"belongs to another base: the weights of {DOWN} in .* are not those it was trained on \({base}\)"
    _refused_everywhere(adapter, base, tmp_path, message)


def test_a_base_that_holds_the_adapter_already(tiny_llama: str, adapter: Path, tmp_path: Path) -> None:
    merged = merge_files(tiny_llama, adapter, tmp_path / "merged", progress=False).output
    _refused_everywhere(adapter, merged, tmp_path, r"belongs to another base.*Load that base, unmerged")


def test_a_lora_is_no_pmss_adapter(tiny_llama: str, adapter: Path, tmp_path: Path) -> None:
    export_files(tiny_llama, adapter, tmp_path / "lora", progress=False)
    message = r"does not describe an adapter of lightning-pmss \(peft_type LORA\).*peft"
    _refused_everywhere(tmp_path / "lora", tiny_llama, tmp_path, message)


def test_a_skeleton_is_refused_for_the_same_reasons(tiny_llama: str, adapter: Path, tmp_path: Path) -> None:
    """Converting by ``skeleton_file``: truncated, missing, of another base, of another rank."""
    file = adapter / "adapter_model.safetensors"
    wrong = {
        "none.safetensors": (None, FileNotFoundError, "does not exist; make it with"),
        "cut.safetensors": (file.read_bytes()[:-3], ValueError, "is not a complete safetensors file"),
        "same.safetensors": (file.read_bytes(), ValueError, "has rank 6 for `.*`, this run asks for 5"),
    }
    for name, (content, error, message) in wrong.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        model = _base(tiny_llama)
        with pytest.raises(error, match=message):
            convert(model, PMSSConfig(rank=5, skeleton_file=str(tmp_path / name)))
        assert not adapted_layers(model)
