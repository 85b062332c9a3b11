"""The adapter folder: round trips of trained adapters, and the list of what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lightning_pmss.conversion.convert import adapted_layers, convert
from lightning_pmss.files import load_adapter, read_adapter, save_adapter
from lightning_pmss.merging import merge, unmerge
from lightning_pmss.methods.pmss.config import PMSSConfig

Train = Callable[..., Any]
Logits = Callable[[nn.Module], torch.Tensor]


def _base(folder: str, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def _edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    change(config)
    (folder / "adapter_config.json").write_text(json.dumps(config))


def _edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize("coordinates", ["orthonormal", "rotation", "spectral", "raw"])
def test_round_trip(tiny_llama: str, tmp_path: Path, train: Train, logits: Logits, coordinates: str) -> None:
    model = train(_base(tiny_llama), coordinates=coordinates, scale=0.7, dropout=0.1)
    save_adapter(model, tmp_path / "a")
    again = _base(tiny_llama)
    plain = logits(again)
    report = load_adapter(again, tmp_path / "a")
    assert (logits(model) - plain).abs().max() > 0.05  # the adapter does something
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)
    assert report.config == PMSSConfig(rank=6, coordinates=coordinates, scale=0.7, dropout=0.1)
    layer = again.get_submodule(Q)
    assert layer.core.weight.requires_grad
    assert not layer.weight.requires_grad


def test_the_file_means_c_u_r_and_nothing_else(tiny_llama: str, tmp_path: Path, train: Train) -> None:
    model = train(_base(tiny_llama), scale=0.3)
    save_adapter(model, tmp_path / "a", base="some/model", revision="abc")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    plain = _base(tiny_llama)
    merge(model)
    for name, layer in adapted_layers(model).items():
        weight, rows, cols = (plain.get_submodule(name).weight, tensors[f"{name}.rows"], tensors[f"{name}.cols"])
        assert rows.dtype == cols.dtype == torch.int32
        assert tensors[f"{name}.U"].dtype == torch.float32
        expected = weight + weight[:, cols] @ tensors[f"{name}.U"] @ weight[rows]
        torch.testing.assert_close(layer.weight, expected)
    assert len(tensors) == 3 * len(adapted_layers(model))
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("some/model", "abc")
    assert config["modules"][Q]["shape"] == [32, 32]
    assert config["modules"][Q]["rank"] == 6
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted(config["files"])


def test_base_name_is_taken_from_the_model(tiny_llama: str, tmp_path: Path, train: Train) -> None:
    save_adapter(train(_base(tiny_llama)), tmp_path / "a")
    assert read_adapter(tmp_path / "a").base_model == tiny_llama


def test_file_is_u_and_indices(tmp_path: Path, train: Train) -> None:
    for rank in (128, 256):
        model = train(nn.Sequential(nn.Linear(320, 384), nn.Linear(384, 320)), rank=rank)
        save_adapter(model, tmp_path / str(rank))
        size = sum(file.stat().st_size for file in (tmp_path / str(rank)).glob("*.safetensors"))
        floor = 2 * (4 * rank * rank + 2 * 4 * rank)
        assert floor <= size <= 1.01 * floor


def test_float64_stays_float64(tmp_path: Path, train: Train) -> None:
    base = nn.Sequential(nn.Linear(8, 9), nn.Linear(9, 8)).double()
    state = {key: value.clone() for key, value in base.state_dict().items()}
    model = train(base, rank=3)
    save_adapter(model, tmp_path / "a")
    again = nn.Sequential(nn.Linear(8, 9), nn.Linear(9, 8)).double()
    again.load_state_dict(state)
    load_adapter(again, tmp_path / "a")
    x = torch.randn(5, 8, dtype=torch.float64)
    torch.testing.assert_close(again(x), model(x), rtol=1e-12, atol=1e-12)
    assert read_adapter(tmp_path / "a").modules["0"].update.U.dtype == torch.float64


@pytest.mark.parametrize(("trained", "loaded"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_same_checkpoint_in_another_dtype(
    tiny_llama: str, tmp_path: Path, train: Train, logits: Logits, trained: str, loaded: str
) -> None:
    model = train(_base(tiny_llama, getattr(torch, trained)))
    save_adapter(model, tmp_path / "a")
    again = _base(tiny_llama, getattr(torch, loaded))
    load_adapter(again, tmp_path / "a")
    torch.testing.assert_close(logits(again), logits(model), rtol=0.1, atol=0.03)


def test_conv1d(tiny_gpt2: str, tmp_path: Path, train: Train, logits: Logits) -> None:
    model = train(_base(tiny_gpt2))
    save_adapter(model, tmp_path / "a")
    adapter = read_adapter(tmp_path / "a")
    assert adapter.modules["transformer.h.0.attn.c_attn"].shape == (72, 24)
    assert {module.layout for module in adapter.modules.values()} == {"conv1d"}
    again = _base(tiny_gpt2)
    load_adapter(again, tmp_path / "a")
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)


def test_trained_in_a_wrapper_loads_into_the_plain_model(
    tiny_llama: str, tmp_path: Path, train: Train, logits: Logits
) -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = _base(tiny_llama)

    model = train(Wrapper())
    save_adapter(model, tmp_path / "a")
    again = _base(tiny_llama)
    load_adapter(again, tmp_path / "a")
    torch.testing.assert_close(logits(again), logits(model.inner), rtol=1e-5, atol=1e-5)
    load_adapter(Wrapper(), tmp_path / "a")


def test_also_train(tiny_llama: str, tmp_path: Path, train: Train, logits: Logits) -> None:
    def fresh() -> Any:
        torch.manual_seed(torch.initial_seed() + 1)  # the head differs from call to call
        return AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=3)

    model = train(fresh(), also_train=["score"])
    save_adapter(model, tmp_path / "a")
    assert set(read_adapter(tmp_path / "a").also_train) == {"score.weight"}
    again = fresh()
    assert not torch.equal(again.score.weight, model.score.weight)
    load_adapter(again, tmp_path / "a")
    assert again.score.weight.requires_grad
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"score.weight has the shape \[3, 32\].*\[2, 32\].*labels"):
        load_adapter(AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=2), tmp_path / "a")


def test_buffers_of_also_train_travel(tmp_path: Path, train: Train) -> None:
    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        body = nn.Linear(6, 6)
        nn.init.eye_(body.weight)
        return nn.ModuleDict({"body": body, "norm": nn.BatchNorm1d(6)})

    model = train(build(0), rank=2, also_train=["norm"])
    model["norm"].running_mean.fill_(3.0)
    model["norm"].num_batches_tracked.fill_(7)
    save_adapter(model, tmp_path / "a")
    again = build(1)
    load_adapter(again, tmp_path / "a")
    assert again["norm"].running_mean.tolist() == [3.0] * 6  # type: ignore[index, union-attr, operator]
    assert again["norm"].num_batches_tracked == 7  # type: ignore[index]


def test_loading_onto_a_converted_model(tiny_llama: str, tmp_path: Path, train: Train, logits: Logits) -> None:
    model = train(_base(tiny_llama))
    save_adapter(model, tmp_path / "a")
    other = train(_base(tiny_llama), seed=5, coordinates="spectral")
    assert (logits(other) - logits(model)).abs().max() > 0.01
    load_adapter(other, tmp_path / "a")
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-5, atol=1e-5)
    load_adapter(other, tmp_path / "a")
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [{"rank": 5}, {"seed": 9, "selection": "random"}, {"target_modules": ["q_proj"]}])
def test_model_converted_otherwise(tiny_llama: str, tmp_path: Path, train: Train, config: dict[str, Any]) -> None:
    save_adapter(train(_base(tiny_llama)), tmp_path / "a")
    other = train(_base(tiny_llama), **config)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(ValueError, match="already converted differently.*fresh model"):
        load_adapter(other, tmp_path / "a")
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())


def test_merged_model(tiny_llama: str, tmp_path: Path, train: Train, logits: Logits) -> None:
    model = train(_base(tiny_llama))
    expected = logits(model)
    merge(model)
    save_adapter(model, tmp_path / "a")  # C and R of the pristine W
    with pytest.raises(ValueError, match=r"the model is merged. Call unmerge\(model\)"):
        load_adapter(model, tmp_path / "a")
    unmerge(model)
    again = _base(tiny_llama)
    load_adapter(again, tmp_path / "a")
    torch.testing.assert_close(logits(again), expected, rtol=1e-5, atol=1e-5)


def test_real_model(shared: Path, tmp_path: Path, train: Train, logits: Logits) -> None:
    folder = str(shared / "models" / "stories260K")
    model = train(_base(folder), rank=16)
    save_adapter(model, tmp_path / "a")
    again = _base(folder)
    load_adapter(again, tmp_path / "a")
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)


# What is refused, each by one message that names the file or the modules and says what to do.


def _fill(key: str, value: float) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors[key][..., 0].fill_(value)


BAD_TENSORS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "missing": (lambda t: t.pop(f"{Q}.U"), rf"lacks {Q}.U\b"),
    "foreign": (lambda t: t.update(lora_A=torch.ones(2)), "has lora_A, which adapter_config.json does not list"),
    "nan": (_fill(f"{Q}.U", float("nan")), f"NaN or infinite values in {Q}.U"),
    "inf": (_fill(f"{Q}.U", float("inf")), f"NaN or infinite values in {Q}.U"),
    "shape": (lambda t: t.update({f"{Q}.U": torch.ones(5, 6)}), rf"{Q}.U is torch.float32 \[5, 6\].*\[6, 6\]"),
    "dtype": (lambda t: t.update({f"{Q}.U": torch.ones(6, 6).half()}), f"{Q}.U is torch.float16"),
    "outside": (_fill(f"{Q}.rows", 32), rf"{Q}.rows has indices outside 0..31"),
    "negative": (_fill(f"{Q}.cols", -1), rf"{Q}.cols has indices outside 0..31"),
    "twice": (lambda t: t[f"{Q}.cols"].fill_(3), rf"{Q}.cols has an index twice"),
    "no index": (lambda t: t.update({f"{Q}.cols": torch.ones(6)}), rf"{Q}.cols is torch.float32"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors(tiny_llama: str, tmp_path: Path, train: Train, case: str) -> None:
    save_adapter(train(_base(tiny_llama)), tmp_path / "a")
    change, message = BAD_TENSORS[case]
    _edit_tensors(tmp_path / "a", change)
    model = _base(tiny_llama)
    with pytest.raises(ValueError, match=f"adapter_model.safetensors.*{message}"):
        load_adapter(model, tmp_path / "a")
    assert not adapted_layers(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


BAD_CONFIG: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "newer": (lambda c: c.update(format_version=99), "format version 99.*upgrade"),
    "no version": (lambda c: c.pop("format_version"), "does not describe an adapter of lightning-pmss"),
    "lora": (
        lambda c: c.update(peft_type="LORA"),
        r"does not describe an adapter of lightning-pmss \(peft_type LORA\)",
    ),
    "no modules": (lambda c: c.pop("modules"), "damaged or was edited by hand"),
    "empty": (lambda c: c.update(modules={}), "damaged or was edited by hand"),
    "layout": (lambda c: c["modules"][Q].update(layout="meta"), "damaged or was edited by hand"),
    "option": (lambda c: c["config"].update(rank=0), "options do not fit this version.*rank=0"),
    "new option": (lambda c: c["config"].update(spin=1), "options do not fit this version.*spin"),
    "module gone": (lambda c: c["modules"].pop(Q), rf"has {Q}.U, .*does not list"),
    "module more": (lambda c: c["modules"].update(x=c["modules"][Q]), "lacks x.U, x.cols, x.rows"),
}


@pytest.mark.parametrize("case", BAD_CONFIG)
def test_bad_config(tiny_llama: str, tmp_path: Path, train: Train, case: str) -> None:
    save_adapter(train(_base(tiny_llama)), tmp_path / "a")
    change, message = BAD_CONFIG[case]
    _edit_config(tmp_path / "a", change)
    model = _base(tiny_llama)
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path / "a")
    assert not adapted_layers(model)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("keep", [0, 5, 100, -3])
def test_truncated_files(tiny_llama: str, tmp_path: Path, train: Train, file: str, keep: int) -> None:
    save_adapter(train(_base(tiny_llama)), tmp_path / "a")
    content = (tmp_path / "a" / file).read_bytes()
    (tmp_path / "a" / file).write_bytes(content[:keep])
    with pytest.raises(ValueError, match=f"{file}.*(truncated|readable)"):
        load_adapter(_base(tiny_llama), tmp_path / "a")


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_missing_files(tiny_llama: str, tmp_path: Path, train: Train, file: str) -> None:
    save_adapter(train(_base(tiny_llama)), tmp_path / "a")
    (tmp_path / "a" / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"a lacks {file}"):
        load_adapter(_base(tiny_llama), tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        load_adapter(_base(tiny_llama), tmp_path / "none")


def test_wrong_base_is_named(tiny_llama: str, tmp_path: Path, train: Train) -> None:
    save_adapter(train(_base(tiny_llama)), tmp_path / "a", base="org/base", revision="r1")
    other = _base(tiny_llama)
    rows = read_adapter(tmp_path / "a").modules[DOWN].update.rows
    with torch.no_grad():
        other.get_submodule(DOWN).weight[rows[0], 0] *= 1.0001
    with pytest.raises(ValueError, match=rf"another base: the weights of {DOWN} in.*org/base, revision r1"):
        load_adapter(other, tmp_path / "a")
    assert not adapted_layers(other)
    # Also on a model that is converted to the same indices by chance.
    save_adapter(train(_base(tiny_llama)), tmp_path / "b")
    converted = train(_base(tiny_llama))
    with torch.no_grad():
        converted.get_submodule(DOWN).weight[rows[0], 0] *= 1.0001
    with pytest.raises(ValueError, match="another base"):
        load_adapter(converted, tmp_path / "b")


def test_other_architectures(tiny_llama: str, tiny_gpt2: str, tmp_path: Path, train: Train) -> None:
    save_adapter(train(_base(tiny_llama)), tmp_path / "a")
    with pytest.raises(ValueError, match=f"layers that the model does not have: {Q}.*and 9 more"):
        load_adapter(_base(tiny_gpt2), tmp_path / "a")
    wider = AutoModelForCausalLM.from_config(_base(tiny_llama).config.__class__(
        vocab_size=320, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    ))  # fmt: skip
    with pytest.raises(ValueError, match=rf"{Q} was trained on W \[out, in\] = \[32, 32\], and is \[48, 48\]"):
        load_adapter(wider, tmp_path / "a")
    deeper = AutoModelForCausalLM.from_config(_base(tiny_llama).config.__class__(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2,
    ))  # fmt: skip
    with pytest.raises(ValueError, match=r"select other layers.*model.layers.2"):
        load_adapter(deeper, tmp_path / "a")
    assert not adapted_layers(deeper)


def test_saving_refuses(tiny_llama: str, tmp_path: Path, train: Train) -> None:
    with pytest.raises(ValueError, match=r"no converted layer.*convert\(model, config\)"):
        save_adapter(_base(tiny_llama), tmp_path / "a")
    model = train(_base(tiny_llama))
    save_adapter(model, tmp_path / "a")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save_adapter(model, tmp_path / "a")
    save_adapter(model, tmp_path / "a", overwrite=True)
    model.get_submodule(Q).core.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=f"NaN or infinite values in {Q}.U"):
        save_adapter(model, tmp_path / "a", overwrite=True)
    load_adapter(_base(tiny_llama), tmp_path / "a")  # the old one is still whole


def test_full_disk_keeps_the_old_adapter(
    tiny_llama: str, tmp_path: Path, train: Train, logits: Logits, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = train(_base(tiny_llama))
    save_adapter(model, tmp_path / "a")

    def full(*_: Any, **__: Any) -> None:  # in the words of safetensors
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr("lightning_pmss.store.shards.save_file", full)
        with pytest.raises(OSError, match="adapter_model.safetensors") as caught:
            save_adapter(train(_base(tiny_llama), seed=9), tmp_path / "a", overwrite=True)
    assert caught.value.errno == 28
    assert "Nothing was changed" in caught.value.__notes__[0]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    again = _base(tiny_llama)
    load_adapter(again, tmp_path / "a")
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)


def test_zero_update_is_an_adapter_too(tiny_llama: str, tmp_path: Path, logits: Logits) -> None:
    model = _base(tiny_llama)
    expected = logits(model)
    convert(model, PMSSConfig(rank=4))
    save_adapter(model, tmp_path / "a")
    again = _base(tiny_llama)
    load_adapter(again, tmp_path / "a")
    assert torch.equal(logits(again), expected)


def test_one_of_several_alike_layers(tmp_path: Path, train: Train) -> None:
    """The others are in no file by name, trained in full or frozen, and belong to the architecture all the same."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))

    model = train(build(), rank=3, target_modules=["0"], also_train=["2"])
    again = build()
    load_adapter(again, save_adapter(model, tmp_path / "a"))
    assert set(adapted_layers(again)) == {"0"}
    deeper = nn.Sequential(*build(), nn.Linear(8, 8))
    with pytest.raises(ValueError, match="its options select other layers in this model than the ones stored: 5"):
        load_adapter(deeper, tmp_path / "a")
