"""Adapters of models that transformers loaded quantised: save, load, merge, export, and what is refused."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from lightning_pmss import PMSSConfig, convert, load_adapter, merge, save_adapter, unmerge
from lightning_pmss.conversion.convert import adapted_layers
from lightning_pmss.files import export_lora, merge_files, read_adapter, write_merged
from lightning_pmss.layers.quantised import dequantised, is_quantised
from lightning_pmss.merging import merged
from lightning_pmss.named import disable_adapter, load_adapters, set_adapter

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install lightning-pmss[quantised]")
pytest.importorskip("torchao", reason="torchao is not installed: pip install lightning-pmss[quantised]")

KINDS = ("nf4", "int8", "torchao")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer LLaMA, with biases in its attention, in bfloat16."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attention_bias=True, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(std=0.1)
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    return folder


def load(base: Path, kind: str, dtype: str = "float32") -> Any:
    if kind == "nf4":
        config: Any = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        )
    elif kind == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        config = TorchAoConfig(Int8WeightOnlyConfig())
    return AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=dtype)


def trained(base: Path, kind: str) -> Any:
    model = load(base, kind)
    convert(model, PMSSConfig(rank=12, rank_pattern={"k_proj": 5}, scale=0.7))
    torch.manual_seed(1)
    for layer in adapted_layers(model).values():
        nn.init.normal_(layer.core.weight, std=0.1)
    return model.train()  # int8 of bitsandbytes quantises activations in evaluation mode


IDS = torch.tensor([[3, 7, 1, 9, 30, 2], [5, 5, 40, 2, 0, 11]])


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits.float()  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_comes_back_on_the_base_quantised_again(kind: str, base: Path, tmp_path: Path) -> None:
    model = trained(base, kind)
    assert all(is_quantised(layer) for layer in adapted_layers(model).values())
    assert len(adapted_layers(model)) == 14
    save_adapter(model, tmp_path / "adapter")
    again = load(base, kind)
    load_adapter(again, tmp_path / "adapter")
    torch.testing.assert_close(logits(again.train()), logits(model), rtol=1e-4, atol=1e-5)
    assert float((logits(model) - logits(load(base, kind).train())).abs().max()) > 0.01
    word = "torchao Int8Tensor" if kind == "torchao" else f"bitsandbytes {kind}"
    assert read_adapter(tmp_path / "adapter").quantisation == [word]


def test_the_dense_base_is_another_base(base: Path, tmp_path: Path) -> None:
    save_adapter(trained(base, "nf4"), tmp_path / "adapter")
    dense = AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(ValueError, match=r"another base.*quantised weights \(bitsandbytes nf4\).*write_merged"):
        load_adapter(dense, tmp_path / "adapter")
    assert not adapted_layers(dense)
    with pytest.raises(ValueError, match=r"another base.*quantised weights \(bitsandbytes nf4\)"):
        merge_files(base, tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    with pytest.raises(ValueError, match="another base"):
        load_adapter(load(base, "int8"), tmp_path / "adapter")


def test_the_adapter_of_the_dense_base_is_refused_on_the_quantised_one(base: Path, tmp_path: Path) -> None:
    dense = AutoModelForCausalLM.from_pretrained(base)
    convert(dense, PMSSConfig(rank=12))
    save_adapter(dense, tmp_path / "adapter")
    with pytest.raises(ValueError, match="another base"):
        load_adapter(load(base, "nf4"), tmp_path / "adapter")


def test_a_skeleton_of_the_dense_checkpoint_is_refused(base: Path, tmp_path: Path) -> None:
    from lightning_pmss.files.select import select_files

    select_files(base, tmp_path / "skeleton.safetensors", PMSSConfig(rank=12))
    model = load(base, "nf4")
    config = PMSSConfig(rank=12, skeleton_file=str(tmp_path / "skeleton.safetensors"))
    with pytest.raises(ValueError, match=r"another base.*leave skeleton_file out"):
        convert(model, config)
    assert not adapted_layers(model)


@pytest.mark.parametrize("kind", KINDS)
def test_merge_in_memory_asks_first_and_comes_back_bit_for_bit(kind: str, base: Path, tmp_path: Path) -> None:
    model = trained(base, kind)
    before, keys = logits(model), list(model.state_dict())
    with pytest.raises(ValueError, match=r"is quantised \((bitsandbytes|torchao).*dequantise=True.*requantise=True"):
        merge(model)
    report = merge(model, dequantise=True)
    assert len(report.layers) == 14
    assert report.relative_error < 1e-6  # to float32
    torch.testing.assert_close(logits(model), before, rtol=1e-3, atol=1e-4)
    assert not any(is_quantised(layer) for layer in adapted_layers(model).values())
    save_adapter(model, tmp_path / "merged")  # of the codes, which are kept aside
    unmerge(model)
    save_adapter(model, tmp_path / "plain")
    stored = [read_adapter(tmp_path / name) for name in ("merged", "plain")]
    assert stored[0].quantisation == stored[1].quantisation
    assert [m.fingerprint for m in stored[0].modules.values()] == [m.fingerprint for m in stored[1].modules.values()]
    assert torch.equal(logits(model), before)
    assert list(model.state_dict()) == keys
    with merged(model, dequantise=True):
        torch.testing.assert_close(logits(model), before, rtol=1e-3, atol=1e-4)
    assert torch.equal(logits(model), before)


def test_requantising_reports_its_error(base: Path) -> None:
    model = trained(base, "nf4")
    before = logits(model)
    wanted = {
        n: m.base_weight() + m.weight_columns() @ m.core_update() @ m.weight_rows()
        for n, m in adapted_layers(model).items()
    }
    report = merge(model, requantise=True)
    for name, layer in adapted_layers(model).items():
        assert is_quantised(layer)
        error = torch.linalg.matrix_norm(dequantised(layer) - wanted[name]) / torch.linalg.matrix_norm(wanted[name])
        assert report.layers[name].relative_error == pytest.approx(float(error), rel=1e-3)
    assert 0.03 < report.relative_error < 0.2
    assert not torch.equal(logits(model), before)
    unmerge(model)
    assert torch.equal(logits(model), before)
    with pytest.raises(ValueError, match="requantise=True is for bitsandbytes 4-bit only"):
        merge(trained(base, "int8"), requantise=True)
    with pytest.raises(ValueError, match="exclude one another"):
        merge(model, requantise=True, dequantise=True)


@pytest.mark.parametrize("kind", KINDS)
def test_the_written_model_is_dense_and_computes_the_same(kind: str, base: Path, tmp_path: Path) -> None:
    model = trained(base, kind)
    model.model.layers[1].mlp.down_proj.core.weight.data.zero_()
    before, settings = logits(model), copy.deepcopy(model.config.to_dict())
    report = write_merged(model, tmp_path / "merged")
    assert len(report.merged) == 14
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(plain.model.layers[0].self_attn.q_proj) is nn.Linear
    torch.testing.assert_close(logits(plain), before, rtol=1e-3, atol=1e-4)
    assert model.config.to_dict() == settings
    assert model.hf_quantizer is not None
    assert torch.equal(logits(model), before)


def test_layers_left_out_are_written_dense_too(base: Path, tmp_path: Path) -> None:
    model = load(base, "nf4")
    convert(model, PMSSConfig(target_modules=["q_proj"], rank=12))
    before = logits(model)
    write_merged(model, tmp_path / "merged")
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), before, rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_peft_loads_the_export_onto_the_quantised_base(kind: str, base: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = trained(base, kind)
    export_lora(model, tmp_path / "lora")
    theirs = peft.PeftModel.from_pretrained(load(base, kind), tmp_path / "lora").train()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_named_adapters_share_the_codes(kind: str, base: Path, tmp_path: Path) -> None:
    model = trained(base, kind)
    plain = logits(load(base, kind).train())
    with disable_adapter(model):
        assert torch.equal(logits(model), plain)
    first = logits(model)
    save_adapter(model, tmp_path / "first")
    for layer in adapted_layers(model).values():
        layer.core.weight.data.mul_(-1)
    second = logits(model)
    save_adapter(model, tmp_path / "second")
    both = load(base, kind)
    load_adapters(both, {"first": tmp_path / "first", "second": tmp_path / "second"})
    for name, expected in (("second", second), ("first", first)):
        set_adapter(both, name)
        torch.testing.assert_close(logits(both.train()), expected, rtol=1e-3, atol=1e-4)


def test_a_quantised_checkpoint_loads_and_keeps_its_fingerprints(base: Path, tmp_path: Path) -> None:
    model = load(base, "nf4")
    model.save_pretrained(tmp_path / "codes")
    convert(model, PMSSConfig(rank=12))
    save_adapter(model, tmp_path / "adapter")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "codes", dtype="float32")
    assert all(is_quantised(m) for n, m in again.named_modules() if n.endswith("_proj"))
    load_adapter(again, tmp_path / "adapter")
    with pytest.raises(ValueError, match="quantised form"):
        merge_files(tmp_path / "codes", tmp_path / "adapter", tmp_path / "merged")


@pytest.mark.parametrize("kind", KINDS)
def test_the_lines_of_the_card_load_the_adapter(kind: str, base: Path, tmp_path: Path) -> None:
    model = trained(base, kind)
    save_adapter(model, tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    assert re.search(r"- Base: .*, unmerged, quantised \((bitsandbytes|torchao) \w+\)\.", card)
    assert "lightning_pmss merge" not in card
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code
    names: dict[str, Any] = {}
    exec(code[1].replace("THIS_FOLDER", str(tmp_path / "adapter")), names)  # noqa: S102
    torch.testing.assert_close(logits(names["model"].train()), logits(model), rtol=1e-4, atol=1e-5)


def test_the_blocks_of_the_page(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "quantised.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block.replace("MODEL_DIR", str(base)), names)  # noqa: S102
    assert (tmp_path / "dense" / "config.json").is_file()
    assert names["report"].relative_error > 0
    assert adapted_layers(names["fresh"])
