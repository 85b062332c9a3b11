"""Generation stops where responses end: at the end of a turn of the chat template, of the model's tokenizer or the data's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from handmade import HandMade, collate
from torch.utils.data import DataLoader

from lightning_pmss.datamodules.chat import end_of_turn
from lightning_pmss.modules import CausalLMModule

TEMPLATE = "{% for m in messages %}{{ m['role'] + '\n' + m['content'] + END + '\n' }}{% endfor %}"


@pytest.fixture
def module(tiny_llama: str) -> CausalLMModule:
    made = CausalLMModule(tiny_llama, max_new_tokens=12)
    made.configure_model()
    with torch.no_grad():  # a random model repeats one token whatever the prompt; larger weights make it vary
        for parameter in made.model.parameters():
            parameter.mul_(4)
    return made.eval()


def greedy(module: CausalLMModule, batch: dict[str, Any]) -> list[int]:
    asked = batch["prompt_ids"]
    made = module.model.generate(asked, attention_mask=batch["prompt_mask"], max_new_tokens=12, do_sample=False)
    return made[0, asked.shape[1] :].tolist()


def cut(module: CausalLMModule, ids: list[int], end: int) -> str:
    return module.tokenizer.decode(ids[: ids.index(end)], skip_special_tokens=True).strip()


@pytest.mark.parametrize("special", [True, False])
def test_at_the_turns_end_of_the_models_template(module: CausalLMModule, tiny_llama: str, special: bool) -> None:
    batch = HandMade(tiny_llama).batch(1)
    ids = greedy(module, batch)
    end = next(token for token in ids[3:] if token not in ids[:3])
    text = module.tokenizer.convert_ids_to_tokens(end)
    if not special:  # a mark that is no special token ends the text all the same, and is not part of it
        module.tokenizer.add_tokens([text])
    else:
        module.tokenizer.add_special_tokens({"additional_special_tokens": [text]})
    expected = cut(module, ids, end)
    assert module.generate(batch["prompt_ids"], batch["prompt_mask"]) != [expected]
    module.tokenizer.chat_template = TEMPLATE.replace("END", repr(text))
    assert end_of_turn(module.tokenizer) == end
    assert module.generate(batch["prompt_ids"], batch["prompt_mask"]) == [expected]


def test_at_the_end_that_the_data_names(
    module: CausalLMModule, tiny_llama: str, trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    data = HandMade(tiny_llama)
    ids = [greedy(module, data.batch(number)) for number in range(len(data.rows))]
    end = next(token for token in ids[1][3:] if token not in ids[1][:3])

    def ended(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return collate(rows, data.pad) | {"end_id": torch.full((len(rows),), end)}

    class Ending(HandMade):
        def test_dataloader(self) -> DataLoader[Any]:
            return DataLoader(self.rows, batch_size=2, collate_fn=ended)

        predict_dataloader = test_dataloader

    expected = [
        cut(module, row, end) if end in row else module.tokenizer.decode(row, skip_special_tokens=True).strip()
        for row in ids
    ]
    assert any(end in row for row in ids)
    trainer().test(module, Ending(tiny_llama), verbose=False)
    lines = [json.loads(line) for line in (tmp_path / "predictions-test.jsonl").read_text().splitlines()]
    assert [line["output"] for line in lines] == expected
    found = trainer().predict(module, Ending(tiny_llama))
    assert [text for batch in found or [] for text in batch] == expected
    # Another batch names none: the end of the one before is forgotten.
    assert module._answers(data.batch(1))[0]["output"] != expected[1]


def test_templates_that_cannot_be_taken_apart_end_nothing(module: CausalLMModule) -> None:
    for template in (None, "", "{{ raise_exception('no') }}", "{{ messages[0]['content'] }}"):
        module.tokenizer.chat_template = template
        assert end_of_turn(module.tokenizer) is None
