"""Rotary frequencies keep float32 when the module is cast; what a checkpoint holds is cast as ever."""

from __future__ import annotations

import lightning as L
import torch

from lightning_pmss.datamodules import ArithmeticDataModule
from lightning_pmss.modules import CausalLMModule


def test_bf16_true_leaves_rotary_frequencies(tiny_llama: str) -> None:
    module = CausalLMModule(tiny_llama)
    module.configure_model()
    exact = module.model.model.rotary_emb.inv_freq.clone()
    module.to(torch.bfloat16)
    assert module.model.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(module.model.model.rotary_emb.inv_freq, exact)
    assert not torch.equal(exact, exact.bfloat16().float())  # else the test could not fail


def test_a_buffer_of_the_checkpoint_is_cast(tiny_llama: str) -> None:
    module = CausalLMModule(tiny_llama)
    module.configure_model()
    module.model.register_buffer("stored", torch.ones(2))
    module.to(torch.bfloat16)
    assert module.model.stored.dtype == torch.bfloat16


def test_logits_under_bf16_true_are_those_of_transformers(tiny_llama: str) -> None:
    class Recording(CausalLMModule):
        logits: list[torch.Tensor]

        def forward(self, *args, **options):  # type: ignore[no-untyped-def]
            found = super().forward(*args, **options)
            self.logits.append(found.detach())
            return found

    module = Recording(tiny_llama, dtype="bfloat16", warmup_ratio=0.0)
    module.logits = []
    trainer = L.Trainer(
        accelerator="cpu", precision="bf16-true", logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    data = ArithmeticDataModule(tiny_llama, test_size=2, eval_batch_size=2)
    module.generate_in = []
    trainer.validate(module, data, verbose=False)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    batch = next(iter(data.val_dataloader()))
    with torch.no_grad():
        expected = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert torch.equal(module.logits[0], expected)
