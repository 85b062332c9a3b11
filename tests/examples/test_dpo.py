"""Preferences: the loss is that of two separate models, and training raises the margin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_pmss import PMSSConfig, convert, load_adapter
from lightning_pmss.conversion.convert import adapted_layers
from lightning_pmss.merging import merged_state_dict
from tests.examples.test_examples import load


def batch_of(tokenizer: Any, answers: list[str]) -> dict[str, torch.Tensor]:
    prompt = tokenizer("How many?")["input_ids"]
    rows = [prompt + tokenizer(answer)["input_ids"] for answer in answers]
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([row + [0] * (width - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
        "labels": torch.tensor(
            [[-100] * len(prompt) + row[len(prompt) :] + [-100] * (width - len(row)) for row in rows]
        ),
    }


def by_hand(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Log-likelihoods in float64, row by row and without padding."""
    found = []
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        length = int(mask.sum())
        with torch.no_grad():
            logits = model(input_ids=ids[None, :length]).logits[0]
        chances = logits.log_softmax(-1)
        found.append(sum(chances[t - 1, ids[t]] for t in range(1, length) if labels[t] != -100))
    return torch.stack(found)  # type: ignore[arg-type]


def test_the_loss_is_that_of_two_models(tiny_llama: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    module = load("dpo").DPO(tiny_llama, beta=0.3)
    convert(module, PMSSConfig(rank=6))
    module.log = lambda *args, **options: None
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in adapted_layers(module).values():
            for value in layer.core.trained().values():
                value.copy_(torch.randn(value.shape, generator=generator))
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    batch = {
        "chosen": batch_of(tokenizer, ["12", "five boxes", "3"]),
        "rejected": batch_of(tokenizer, ["a train of pens", "no", "60 miles"]),
    }
    base, policy = (AutoModelForCausalLM.from_pretrained(tiny_llama).double().eval() for _ in range(2))
    policy.load_state_dict(merged_state_dict(module.model.double()))
    module.model.float()
    margin = (by_hand(policy, batch["chosen"]) - by_hand(policy, batch["rejected"])) - (
        by_hand(base, batch["chosen"]) - by_hand(base, batch["rejected"])
    )
    loss = -torch.nn.functional.logsigmoid(0.3 * margin).mean()
    found = module.training_step(batch, 0)
    assert margin.abs().max() > 0.5
    torch.testing.assert_close(found.double(), loss, rtol=1e-4, atol=1e-5)


def test_training_raises_the_margin(tiny_llama: str, tmp_path: Path) -> None:
    example = load("dpo")
    options = ["--model", tiny_llama, "--rank", "8", "--lr", "2e-2", "--steps", "16", "--output", str(tmp_path)]
    margins = example.main(options)
    assert margins["first"] == pytest.approx(0, abs=1e-3)  # the update begins at zero
    assert margins["last"] > 5
    # The adapter of the preferences loads onto the base, whose own preference is the reference.
    module = example.DPO(tiny_llama)
    load_adapter(module.model, tmp_path / "adapter")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    pair = {"chosen": batch_of(tokenizer, ["12"]), "rejected": batch_of(tokenizer, ["12"])}
    assert module.margins(pair).item() == pytest.approx(0)
