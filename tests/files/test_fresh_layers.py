"""Converted layers whose weights are fresh: not, or not completely, in the files of the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from lightning_pmss import export_lora, load_adapter, save_adapter
from lightning_pmss.conversion.convert import adapted_layers
from lightning_pmss.files import merge_files, read_adapter
from lightning_pmss.inspect.inspection import inspect_adapter
from lightning_pmss.named import load_adapters
from tests.files.fresh_models import close, logits, trained


def bert(folder: Path) -> Path:
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    BertForMaskedLM(BertConfig(vocab_size=50, **sizes)).save_pretrained(folder)
    return folder


def test_a_converted_layer_whose_weight_is_fresh(tmp_path: Path) -> None:
    """BERT's pooler is in the body and in no file of a masked language model."""
    base, load = bert(tmp_path / "base"), BertForSequenceClassification.from_pretrained
    torch.manual_seed(5)
    model = trained(load(base))
    assert "bert.pooler.dense" in adapted_layers(model)
    save_adapter(model, tmp_path / "adapter")
    assert set(read_adapter(tmp_path / "adapter").fresh) == {
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "classifier.weight",
        "classifier.bias",
    }
    torch.manual_seed(6)
    again = load(base)
    load_adapter(again, tmp_path / "adapter")
    close(logits(again), logits(model))
    named = load(base)
    load_adapters(named, {"a": tmp_path / "adapter"})
    close(logits(named), logits(model))
    merge_files(base, tmp_path / "adapter", tmp_path / "merged", progress=False)
    close(logits(load(tmp_path / "merged")), logits(model))
    inspect_adapter(tmp_path / "adapter", base)
    with pytest.raises(ValueError, match=r"bert\.pooler\.dense: the weight is in no file of the base, so a LoRA"):
        export_lora(model, tmp_path / "lora", progress=False)


def with_tokens(folder: Path) -> Any:
    model = LlamaForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(60)
    return model


def test_a_converted_head_with_rows_of_added_tokens(tmp_path: Path) -> None:
    """The adapter stores the new rows alone; the others come from the base."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(vocab_size=50, tie_word_embeddings=False, **sizes)).save_pretrained(base)
    model = trained(with_tokens(base), target_modules=["lm_head", "q_proj", "k_proj"], selection="random", seed=3)
    assert int(model.get_submodule("lm_head").indices()["rows"].max()) >= 10  # 60 rows, of which the file has 10
    save_adapter(model, adapter)
    assert read_adapter(adapter).fresh["lm_head.weight"].start == 50
    again = with_tokens(base)
    load_adapter(again, adapter)
    close(logits(again), logits(model))
    named = with_tokens(base)
    load_adapters(named, {"a": adapter})
    close(logits(named), logits(model))
    merge_files(base, adapter, tmp_path / "merged", progress=False)
    close(logits(LlamaForCausalLM.from_pretrained(tmp_path / "merged")), logits(model))
    inspect_adapter(adapter, base)


def test_a_wrong_base_is_named_also_beside_a_fresh_layer(tmp_path: Path) -> None:
    base = bert(tmp_path / "base")
    save_adapter(trained(BertForSequenceClassification.from_pretrained(base)), tmp_path / "adapter")
    file = base / "model.safetensors"
    tensors = {n: t + (0.1 if n.endswith(("query.weight", "key.weight")) else 0) for n, t in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"belongs to another base: .*key.*query"):
        merge_files(base, tmp_path / "adapter", tmp_path / "merged", progress=False)
