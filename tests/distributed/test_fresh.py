"""Frozen tensors that no file of the base holds, under every strategy: in the adapter, in the merged model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lightning_pmss import load_adapter
from lightning_pmss.conversion.convert import adapted_layers
from lightning_pmss.files import read_adapter
from tests.distributed.fresh import TOKENS, build
from tests.distributed.launch import launch, require

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
KINDS = {
    "head": (AutoModelForSequenceClassification, {"score.weight"}),
    "tokens": (AutoModelForCausalLM, {"model.embed_tokens.weight"}),
}


@pytest.mark.parametrize("name", ["ddp", "fsdp1", "fsdp2", "zero2", "zero3"])
def test_adapter_and_merged_model_hold_them(name: str, tiny_llama: str, tmp_path: Path) -> None:
    require(name)
    launch(
        "tests.distributed.fresh",
        [{"folder": str(tmp_path / kind), "strategy": name, "kind": kind, "model": tiny_llama} for kind in KINDS],
    )
    for kind, (loader, names) in KINDS.items():
        out = tmp_path / kind / "out"
        assert set(read_adapter(out / "adapter").fresh) == names
        model = build(kind, tiny_llama, seed=2)
        load_adapter(model, out / "adapter")
        assert any(bool(layer.core.weight.any()) for layer in adapted_layers(model).values())
        own = build(kind, tiny_llama, seed=1)
        for key in names:
            assert torch.equal(model.get_parameter(key), own.get_parameter(key))
        merged = loader.from_pretrained(out / "merged")
        with torch.no_grad():
            torch.testing.assert_close(merged.eval()(TOKENS).logits, model.eval()(TOKENS).logits, rtol=1e-4, atol=1e-5)
