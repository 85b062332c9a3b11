"""Prompt styles byte for byte, the loss on the prompt, and what happens to examples that are too long."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_pmss.datamodules import Example, InstructionCollator, InstructionDataModule
from lightning_pmss.datamodules.collate import IGNORED
from lightning_pmss.datamodules.instruction import Split
from lightning_pmss.datamodules.prompts import PromptEncoder

BELOW = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
S = " " * 16
TEXTS = {
    "plain": ("Question: {A} b?\nAnswer:", "Question: {A} b?\nAnswer:", " c", ""),
    "metamath": (
        BELOW + "\n\n### Instruction:\n{A} b?\n\n### Response:",
        BELOW + "\n\n### Instruction:\n{A} b?\n\n### Response: Let's think step by step.",
        "c",
        "",
    ),
    "llm_adapters": (
        f"{BELOW}  \n\n{S}### Instruction:\n{S}{{A}} b?\n{S}\n{S}### Response:\n{S}",
        f"{BELOW} \n\n{S}### Instruction:\n{S}{{A}} b?\n\n{S}### Response:\n{S}",
        "c",
        "",
    ),
}


class Asked(InstructionDataModule):
    """Ten examples of one question, whose targets are lists."""

    def load_examples(self, split: Split) -> list[Example] | None:
        return None if split == "val" else [Example("{A} b?", "c", [["c"], ["d", str(i)]]) for i in range(10)]


class Long(InstructionDataModule):
    """Six examples of growing length, and one with a long response."""

    def load_examples(self, split: Split) -> list[Example] | None:
        if split == "val":
            return None
        return [Example("x " * (10 * i) + "end?", "yes") for i in range(6)] + [Example("q?", "z " * 80)]


@pytest.fixture
def build(tiny_tokenizer: str, tmp_path: Any) -> Any:
    def build(kind: type[InstructionDataModule] = Asked, **kwargs: Any) -> InstructionDataModule:
        options = {"val_size": 2, "batch_size": 2, "cache_dir": str(tmp_path / "cache"), **kwargs}
        return kind(tiny_tokenizer, **options)

    return build


@pytest.mark.parametrize("style", TEXTS)
def test_texts_of_training_and_evaluation(build: Any, style: str) -> None:
    train, evaluation, response, tail = TEXTS[style]
    module = build(prompt_style=style)
    module.prepare_data()
    module.setup()
    decode = module.encoder.tokenizer.decode
    row = module.data["train"][0]
    assert row["prompt"] == decode(row["prompt_ids"]) == train
    assert decode(row["response_ids"]) == response + tail + "<|endoftext|>"
    # Rows held out from training are evaluated with the evaluation's prompt, like the test set.
    for split in ("val", "test"):
        assert {row["prompt"] for row in module.data[split]} == {evaluation}
    assert not set(module.data["val"]["id"]) & set(module.data["train"]["id"])
    batch = next(iter(module.test_dataloader()))
    assert batch["target"] == [[["c"], ["d", "0"]], [["c"], ["d", "1"]]]
    assert decode(batch["prompt_ids"][0]) == evaluation


def test_loss_on_all(build: Any) -> None:
    module = build(loss_on="all")
    module.setup()
    batch = next(iter(module.train_dataloader()))
    assert torch.equal(batch["labels"] != IGNORED, batch["attention_mask"].bool())
    assert torch.equal(batch["labels"][batch["labels"] != IGNORED], batch["input_ids"][batch["attention_mask"].bool()])
    batch = next(iter(module.test_dataloader()))
    assert (batch["labels"][0] != IGNORED).sum() < batch["attention_mask"][0].sum()  # evaluation: the response


def test_prompts_are_cut_at_their_beginning_and_counted(build: Any) -> None:
    whole = build(Long, val_size=0, max_length=1000)
    whole.setup()
    lengths = whole.data["train"]["length"][:]
    limit = sorted(lengths)[3]
    module = build(Long, val_size=0, max_length=limit, too_long="cut_prompt")
    with pytest.warns(UserWarning, match=rf"lose their beginning, to fit into max_length {limit} tokens"):
        module.setup()
    assert module.dropped == 1  # the long response, which is never cut
    assert module.cut == {"train": 2, "test": 2}
    tokenizer = module.encoder.tokenizer
    cut = 0
    for batch in module.train_dataloader():
        assert batch["input_ids"].shape[1] <= limit
        for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
            text = tokenizer.decode(ids[mask.bool()])
            assert text.endswith("end?\nAnswer: yes<|endoftext|>")
            assert tokenizer.decode(labels[labels != IGNORED]) == " yes<|endoftext|>"
            cut += not text.startswith("Question:")
    assert cut == 2
    batch = next(iter(module.test_dataloader()))
    assert batch["prompt_ids"].shape[1] <= limit


def test_cut_keeps_the_first_token() -> None:
    row = {"prompt_ids": [99, 1, 2, 3, 4, 5], "response_ids": [7, 8]}
    batch = InstructionCollator(0, max_length=5, prefix=1)([row])
    assert batch["input_ids"].tolist() == [[99, 4, 5, 7, 8]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 7, 8]]
    assert InstructionCollator(0, max_length=8, prefix=1)([row])["input_ids"].shape == (1, 8)
    assert InstructionCollator(0, max_length=3, prefix=1)([row])["input_ids"].tolist() == [[99, 7, 8]]


def test_long_examples_can_be_an_error(build: Any) -> None:
    with pytest.raises(ValueError, match=r"of 7 training examples are longer than max_length 40 .* row \d the first"):
        build(Long, val_size=0, max_length=40, too_long="error").setup("fit")
    with pytest.raises(ValueError, match=r"prompts of the test set are longer than max_length 40 tokens; raise"):
        build(Long, val_size=0, max_length=40, too_long="error").setup("test")
    build(Long, val_size=0, max_length=1000, too_long="error").setup()


def test_refusals(build: Any) -> None:
    for argument in ({"loss_on": "prompt"}, {"too_long": "cut"}, {"prompt_style": "quanta"}):
        with pytest.raises(ValueError, match=r"`Asked\(.*give --data\..* or --data\."):
            build(**argument)
    with pytest.raises(ValueError, match="cutting the beginning of a chat would cut its template"):
        build(prompt_style="chat", too_long="cut_prompt")


def test_held_out_rows_are_tokenised_once_and_on_one_process(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    build(prompt_style="metamath").prepare_data()

    def refuse(*_: Any) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(PromptEncoder, "__call__", refuse)
    module = build(prompt_style="metamath")
    module.setup()  # what every rank does
    assert len(module.data["val"]) == 2
    assert set(module.data["val"]["id"]) | set(module.data["train"]["id"]) == set(range(10))
    assert [row["target"][1] for row in module.data["val"]] == [
        ["d", str(number)] for number in module.data["val"]["id"]
    ]
