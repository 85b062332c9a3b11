"""A quantised base under the Trainer: fit with validation, results, and resuming bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM

from lightning_pmss import PMSSCallback, load_adapter
from lightning_pmss.conversion.convert import adapted_layers
from lightning_pmss.datamodules import ArithmeticDataModule
from lightning_pmss.evaluation.identity import model_hash
from lightning_pmss.layers.quantised import is_quantised
from lightning_pmss.metrics import GSM8KAccuracy
from lightning_pmss.modules import CausalLMModule
from lightning_pmss.modules.hub import load_causal_lm
from lightning_pmss.modules.quantisation import QUANTISATIONS
from tests.distributed.launch import on_two_processes

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install lightning-pmss[quantised]")
pytest.importorskip("torchao", reason="torchao is not installed: pip install lightning-pmss[quantised]")


class Losses(L.Callback):
    def __init__(self) -> None:
        self.train: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.train.append(float(outputs["loss"]))


def run(folder: Path, model: str, quantisation: str | None, checkpoint: Path | None = None, **options: Any) -> Any:
    torch.manual_seed(7 if checkpoint else 1)
    module = CausalLMModule(
        model,
        quantisation=quantisation,
        max_new_tokens=4,
        metric=GSM8KAccuracy(),
        lr_schedule="constant",  # type: ignore[arg-type]
    )
    data = ArithmeticDataModule(model, train_size=32, val_size=4, test_size=4, batch_size=4, eval_batch_size=4)
    losses = Losses()
    saver = ModelCheckpoint(folder / "checkpoints", "{step}", every_n_train_steps=3, save_top_k=-1)
    callback = PMSSCallback(rank=8, dropout=0.1, output_dir=folder / "out")
    settings = {"devices": 1, "max_steps": 6, "val_check_interval": 2, "logger": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        callbacks=[callback, saver, losses],
        **{**settings, **quiet, **options},
    )
    trainer.fit(module, data, ckpt_path=checkpoint)
    return module, losses.train, trainer, data


@pytest.mark.slow
@pytest.mark.parametrize("quantisation", QUANTISATIONS)
def test_fit_writes_an_adapter_and_a_dense_model_and_resumes(
    quantisation: str, tiny_llama: str, tmp_path: Path
) -> None:
    module, losses, trainer, data = run(tmp_path / "whole", tiny_llama, quantisation)
    assert len(losses) == 6
    assert all(is_quantised(layer) for layer in adapted_layers(module).values())
    assert len(adapted_layers(module)) == 14
    assert sum(float(layer.core.weight.detach().norm()) > 0 for layer in adapted_layers(module).values()) == 14

    checkpoint = tmp_path / "whole" / "checkpoints" / "step=3.ckpt"
    state = torch.load(checkpoint)["state_dict"]
    assert not [k for k in state if k.endswith((".weight", "absmax", "SCB")) and ".core." not in k]
    assert run(tmp_path / "again", tiny_llama, quantisation, checkpoint)[1] == losses[3:]

    batch = torch.tensor([[1, 5, 9, 60, 3, 8]])
    with torch.no_grad():
        for layer in adapted_layers(module).values():
            layer.dropout = 0.0
        expected = module.model.train()(input_ids=batch).logits  # in evaluation mode int8 quantises the activations too
        again = load_causal_lm(tiny_llama, quantisation=quantisation)
        load_adapter(again, tmp_path / "whole" / "out" / "adapter")
        for layer in adapted_layers(again).values():
            layer.dropout = 0.0
        torch.testing.assert_close(again.train()(input_ids=batch).logits, expected, rtol=1e-4, atol=1e-5)
        dense = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "out" / "merged")
        torch.testing.assert_close(dense(input_ids=batch).logits, expected, rtol=1e-3, atol=1e-4)
    trainer.test(module, data, verbose=False)
    assert model_hash(module.model) == model_hash(module.model)
    assert model_hash(module.model) != model_hash(load_causal_lm(tiny_llama, quantisation=quantisation))


@pytest.mark.distributed
@pytest.mark.parametrize("quantisation", ["nf4", "int8"])
def test_ddp_on_two_processes(quantisation: str, tiny_llama: str, tmp_path: Path) -> None:
    on_two_processes(["-m", "tests.callbacks.ddp_quantised", tmp_path, tiny_llama, quantisation])
    first, second = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert first["quantised"]
    assert first["u"] == second["u"]
    assert first["losses"] != second["losses"]
    assert (tmp_path / "out" / "merged" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("quantisation", ["nf4", "int8", "torchao-int8"])
def test_bf16_true_and_gradient_checkpointing(quantisation: str, tiny_llama: str, tmp_path: Path) -> None:
    module = CausalLMModule(tiny_llama, quantisation=quantisation, dtype="bfloat16", gradient_checkpointing=True)  # type: ignore[arg-type]
    data = ArithmeticDataModule(tiny_llama, train_size=16, val_size=0, test_size=4, batch_size=4)
    trainer = L.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", devices=1, max_steps=3, precision="bf16-true", logger=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[PMSSCallback(rank=8, merge_on_save=None)],
    )  # fmt: skip
    trainer.fit(module, data)
    for layer in adapted_layers(module).values():
        assert is_quantised(layer)
        assert layer.core.weight.dtype == torch.float32
        assert float(layer.core.weight.detach().norm()) > 0


def test_a_strategy_that_keeps_parts_is_refused(tiny_llama: str) -> None:
    from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy

    with pytest.raises(ValueError, match=r"quantisation='nf4' cannot be kept in parts, as FSDPStrategy would"):
        load_causal_lm(tiny_llama, quantisation="nf4", strategy=FSDPStrategy())
    with pytest.raises(ValueError, match="quantisation='torchao-int8' does not go with DDP.*'nf4' or 'int8'"):
        load_causal_lm(tiny_llama, quantisation="torchao-int8", strategy=DDPStrategy())


def test_unknown_words_and_missing_libraries(tiny_llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"quantisation='nf5' is not known; choose one of \['nf4', 'fp4', 'int8'"):
        CausalLMModule(tiny_llama, quantisation="nf5")  # type: ignore[arg-type]
    monkeypatch.setattr("lightning_pmss.modules.quantisation.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs bitsandbytes: pip install 'lightning-pmss\[quantised\]'"):
        load_causal_lm(tiny_llama, quantisation="nf4")
