"""Prompt and response are tokenised as one text, whatever a tokenizer does at the beginning of a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken
from tokenizers_of_kinds import MAKERS, byte_level, make, wrap

from lightning_pmss.datamodules import Example, InstructionDataModule
from lightning_pmss.datamodules.collate import IGNORED
from lightning_pmss.datamodules.continuations import continued, decoded, tokens_of
from lightning_pmss.datamodules.gsm8k import GSM8KDataModule
from lightning_pmss.datamodules.instruction import Split
from lightning_pmss.datamodules.prompts import PromptEncoder
from lightning_pmss.evaluation.likelihood import candidates
from lightning_pmss.metrics import CommonsenseAccuracy

RESPONSES = [
    "It is 12.\n#### 12",
    "the correct answer is answer1",
    "12",
    "-5 boxes",
    " two",
    "\nnext line",
    "3 * 4 = 12",
]
STYLES = {"plain": None, **GSM8KDataModule.styles}
QUESTION = "Ann has 3 boxes. How many pens?"


def _encoder(tokenizer: Any, style: str, evaluation: bool = False, **options: Any) -> PromptEncoder:
    found = STYLES[style]
    if found is None:
        return PromptEncoder(tokenizer, style, InstructionDataModule.plain_template, **options)
    template = (evaluation and found.eval_template) or found.template
    return PromptEncoder(tokenizer, style, template, found.lead, found.tail, **options)


def _encode(encoder: PromptEncoder, responses: list[str] = RESPONSES) -> dict[str, list[Any]]:
    return encoder({"question": [QUESTION] * len(responses), "response": responses})


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("evaluation", [False, True])
def test_tokens_are_those_of_one_text(kind: str, style: str, evaluation: bool) -> None:
    tokenizer = make(kind)
    encoder = _encoder(tokenizer, style, evaluation)
    rows = _encode(encoder)
    one_text = 0
    for response, prompt, start, rest in zip(
        RESPONSES, rows["prompt"], rows["prompt_ids"], rows["response_ids"], strict=True
    ):
        text = prompt + encoder.lead + response
        whole = tokens_of(tokenizer, [text])[0]
        assert start == tokens_of(tokenizer, [prompt])[0]  # as in generation
        assert rest[-1] == tokenizer.eos_token_id
        read = decoded(tokenizer, start + rest[:-1])
        assert read == decoded(tokenizer, whole)
        if kind in ("prepend", "byte_level"):  # the others have no token for a line's end, or add a blank to each text
            assert read == text
        if kind == "byte_level":  # which has no beginnings: the response by itself has the same tokens
            assert rest[:-1] == tokens_of(tokenizer, [encoder.lead + response])[0]
        if whole[: len(start)] == start:  # else the tokenizer merges across the border
            one_text += 1
            assert start + rest[:-1] == whole
    if style not in (
        "llm_adapters",
        "minerva",
    ):  # whose prompts end in blanks, or whose responses begin with a line's end
        assert one_text >= len(RESPONSES) - 1


def test_no_second_blank_on_a_real_sentencepiece_tokenizer(shared: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "stories260K")
    for style in STYLES:
        encoder = _encoder(tokenizer, style)
        rows = _encode(encoder)
        for response, prompt, start, rest in zip(
            RESPONSES, rows["prompt"], rows["prompt_ids"], rows["response_ids"], strict=True
        ):
            text = prompt + encoder.lead + response
            assert tokenizer.decode(start + rest[:-1], skip_special_tokens=True) == text
            if style in ("plain", "metamath", "lm_eval", "cot"):
                assert start + rest[:-1] == tokenizer(text).input_ids  # with its beginning-of-sequence token
    pieces = tokenizer.convert_ids_to_tokens(_encode(_encoder(tokenizer, "metamath"))["response_ids"][1])
    assert pieces[:2] == ["t", "he"]  # not "▁the": the text has no blank there


@pytest.mark.parametrize("kind", ["prepend", "metaspace_first", "byte_level"])
@pytest.mark.parametrize(("bos", "eos"), [(True, False), (True, True), (False, True)])
def test_tokens_that_a_tokenizer_puts_around_texts(kind: str, bos: bool, eos: bool) -> None:
    around, bare = make(kind, bos, eos), make(kind)
    rows, expected = _encode(_encoder(around, "plain")), _encode(_encoder(bare, "plain"))
    front = [around.bos_token_id] if bos else []
    assert rows["prompt_ids"] == [front + ids for ids in expected["prompt_ids"]]
    assert rows["response_ids"] == expected["response_ids"]
    assert all(ids.count(around.eos_token_id) == 1 for ids in rows["response_ids"])


@pytest.mark.parametrize("kind", MAKERS)
def test_worked_examples_are_part_of_the_text(kind: str) -> None:
    tokenizer = make(kind)
    shots = (Example("One?", "It is 12."), Example("Two?", "the end"))
    for style in ("plain", "metamath", "cot"):
        encoder = _encoder(tokenizer, style, shots=shots)
        rows = _encode(encoder, ["It is 12.", "12"])
        for response, prompt, start, rest in zip(
            ["It is 12.", "12"], rows["prompt"], rows["prompt_ids"], rows["response_ids"], strict=True
        ):
            assert start + rest[:-1] == tokens_of(tokenizer, [prompt + encoder.lead + response])[0]


def _merging() -> Any:
    """A tokenizer that has learnt to merge across words: ": 12" and ":the" are tokens."""
    return wrap(byte_level(use_regex=False, more=["Answer: 12"] * 9 + ["Response:the"] * 9))


def test_the_border_is_a_border_between_tokens() -> None:
    """Where a tokenizer merges the end of the prompt with the response, the prompt has the tokens of generation."""
    tokenizer = _merging()
    encoder = _encoder(tokenizer, "plain")
    start, rest = (_encode(encoder, ["12"])[key][0] for key in ("prompt_ids", "response_ids"))
    whole = tokens_of(tokenizer, [encoder.prompt(QUESTION) + " 12"])[0]
    assert whole[: len(start)] != start  # it merges
    assert start == tokens_of(tokenizer, [encoder.prompt(QUESTION)])[0]
    assert rest[:-1] == tokens_of(tokenizer, [" 12"])[0]
    assert tokenizer.decode(start + rest[:-1]) == encoder.prompt(QUESTION) + " 12"
    # Behind a blank a tokenizer with a beginning of its own has none: "the", not "▁the", behind 16 blanks.
    llama = make("prepend")
    start, rest = continued(llama, ["x:\n" + 16 * " "], ["the end"])
    assert llama.convert_ids_to_tokens(tokens_of(llama, ["x:\n" + 16 * " " + "the end"])[0])[-2] == "\u2581the"
    assert "".join(llama.convert_ids_to_tokens(rest[0])).startswith("the")
    assert llama.decode(start[0] + rest[0]) == "x:\n" + 16 * " " + "the end"


def test_texts_that_have_no_tokens_behind_their_prompt_are_refused() -> None:
    class Strange:
        name_or_path = "strange"

        def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
            return {"input_ids": [[len(text)] for text in texts]}

        def decode(self, ids: list[int], **_: Any) -> str:
            return "-".join(map(str, ids))

    with pytest.raises(ValueError, match=r"'strange' has no tokens for ' b' behind 'a' .*--data\.prompt_style"):
        continued(Strange(), ["a"], [" b"])


class Rows(InstructionDataModule):
    def load_examples(self, split: Split) -> list[Example] | None:
        if split == "val":
            return None
        return [Example(f"{QUESTION} {'Think. ' * number}", RESPONSES[number % len(RESPONSES)]) for number in range(8)]


@pytest.fixture
def module(tmp_path: Path) -> Any:
    make("prepend", bos=True).save_pretrained(tmp_path / "tokenizer")

    def build(**options: Any) -> InstructionDataModule:
        made = Rows(str(tmp_path / "tokenizer"), val_size=0, batch_size=8, cache_dir=str(tmp_path), **options)
        made.setup()
        return made

    return build


def test_batches_hold_one_text(module: Any) -> None:
    plain = module()
    tokenizer = plain.encoder.tokenizer
    texts = {f"{plain.encoder.prompt(e.question)} {e.response}" for e in plain.load_examples("train")}
    wanted = sorted([*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in texts)
    batch = next(iter(plain.train_dataloader()))
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    assert sorted(rows) == wanted
    for batch in plain.test_dataloader():  # the prompt is in front of the labels, token by token
        for place, labels in enumerate(batch["labels"]):
            prompt = batch["prompt_ids"][place][batch["prompt_mask"][place].bool()].tolist()
            assert batch["input_ids"][place].tolist()[: len(prompt)] == prompt
            assert (labels[: len(prompt)] == IGNORED).all()
            assert labels[len(prompt)] != IGNORED
    packed = next(iter(module(packing=True).train_dataloader()))
    found = []
    for ids, positions in zip(packed["input_ids"].tolist(), packed["position_ids"].tolist(), strict=True):
        starts = [place for place, position in enumerate(positions) if position == 0] + [len(ids)]
        found += [ids[start:end] for start, end in zip(starts, starts[1:], strict=False)]
    assert sorted(row for row in found if set(row) != {tokenizer.pad_token_id}) == wanted
    limit = max(map(len, wanted)) - 4
    with pytest.warns(UserWarning, match="lose their beginning"):
        cut = module(max_length=limit, too_long="cut_prompt")
    batch = next(iter(cut.train_dataloader()))
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    assert sorted(rows) == sorted(ids if len(ids) <= limit else ids[:1] + ids[1 + len(ids) - limit :] for ids in wanted)


@pytest.mark.parametrize("kind", ["prepend", "metaspace_first", "prefix_space", "byte_level"])
@pytest.mark.parametrize("style", ["plain", "metamath", "llm_adapters"])
def test_labels_are_scored_as_they_are_trained(kind: str, style: str) -> None:
    tokenizer = make(kind, bos=True)
    encoder = _encoder(tokenizer, style)
    stated = [f"the correct answer is {label}" for label in ("answer1", "answer2")]
    question = f"{QUESTION}\n\nAnswer format: answer1/answer2"
    rows = encoder({"question": [question] * 2, "response": stated})
    one, two = rows["response_ids"]
    batch = {
        "id": torch.tensor([0]),
        "prompt": rows["prompt"][:1],
        "target": [["ARC-Easy", "answer1"]],
        "prompt_ids": torch.tensor(rows["prompt_ids"][:1]),
        "prompt_mask": torch.ones(1, len(rows["prompt_ids"][0]), dtype=torch.int64),
        "input_ids": torch.tensor([rows["prompt_ids"][0] + one]),
        "labels": torch.tensor([[IGNORED] * len(rows["prompt_ids"][0]) + one]),
        "end_id": torch.tensor([tokenizer.eos_token_id]),
    }
    assert candidates(CommonsenseAccuracy(), tokenizer, batch) == [{"answer1": one[:-1], "answer2": two[:-1]}]


def test_added_tokens_in_the_text_stay_tokens() -> None:
    tokenizer = make("prepend")
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    (start,), (rest,) = continued(tokenizer, ["Answer:"], [" <think> the end"])
    assert start + rest == tokens_of(tokenizer, ["Answer: <think> the end"])[0]
    assert tokenizer.convert_tokens_to_ids("<think>") in rest
