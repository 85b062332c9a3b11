"""The chat style trains what the template says: the difference that the assistant's turn makes, up to its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from chat_templates import CHATML, DEEPSEEK, GEMMA, MARKED, MARKS, QWEN3, R1, TEMPLATES, tokenizer

from lightning_pmss.datamodules import Example, InstructionCollator, InstructionDataModule
from lightning_pmss.datamodules.collate import IGNORED
from lightning_pmss.datamodules.instruction import Split
from lightning_pmss.datamodules.prompts import PromptEncoder
from lightning_pmss.evaluation.likelihood import candidates
from lightning_pmss.metrics import CommonsenseAccuracy

PLAIN_TEXT = "{% for m in messages %}{{ '### ' + m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"


def _changed(content: str) -> str:
    """ChatML that puts ``content`` for what anyone says but the first."""
    return CHATML.replace("m['content']", f"(m['content'] if loop.first else {content})")


def _encode(template: str, question: str, response: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    encoder = PromptEncoder(tokenizer(template, **options), "chat", "")
    rows = encoder({"question": [question], "response": [response]})
    return encoder, {key: value[0] for key, value in rows.items()}


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompt_and_turn_are_the_templates(name: str) -> None:
    template, prompt, answer, end = TEMPLATES[name]
    encoder, row = _encode(template, "Q", "A")
    chat = encoder.tokenizer
    assert row["prompt"] == prompt
    assert chat.decode(row["prompt_ids"]) == prompt
    assert chat.decode(row["response_ids"]) == answer
    # The token that ends the turn: the last one, once.
    end_id = chat.convert_tokens_to_ids(end)
    assert row["response_ids"][-1] == encoder.end_id == end_id
    assert row["response_ids"].count(end_id) == 1
    # Token by token what transformers makes of the conversation.
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    asked = chat.apply_chat_template(turns[:1], tokenize=True, add_generation_prompt=True, return_dict=False)
    whole = chat.apply_chat_template(turns, tokenize=True, return_dict=False)
    both = row["prompt_ids"] + row["response_ids"]
    assert whole[: len(both)] == both
    assert end_id not in whole[len(both) :] or name == "phi"  # phi's last turn has an end of the text too
    if name not in ("no_generation_prompt", "vicuna"):
        assert row["prompt_ids"] == asked
    for mark in ("<bos>", "<|bos|>", "<|begin_of_text|>", "<s>"):
        assert both.count(chat.convert_tokens_to_ids(mark)) == prompt.count(mark) <= 1


@pytest.mark.parametrize("name", TEMPLATES)
def test_earlier_turns(name: str) -> None:
    template, prompt, answer, _ = TEMPLATES[name]
    shots = (Example("one", "eins"), Example("two", "zwei"))
    encoder = PromptEncoder(tokenizer(template), "chat", "", shots=shots)
    row = encoder({"question": ["Q"], "response": ["A"]})
    text = row["prompt"][0]
    assert [text.count(word) for word in ("one", "eins", "two", "zwei", "Q")] == [1] * 5
    assert text.endswith(prompt.split("Q")[1])
    assert encoder.tokenizer.decode(row["response_ids"][0]) == answer


def test_the_assistants_tokens_are_those_that_transformers_marks() -> None:
    encoder, row = _encode(MARKED, "How many pens?", "It is 12.\n#### 12")
    turns = [{"role": "user", "content": "How many pens?"}, {"role": "assistant", "content": "It is 12.\n#### 12"}]
    marked = encoder.tokenizer.apply_chat_template(
        turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    masks = marked["assistant_masks"]
    trained = [0] * len(row["prompt_ids"]) + [1] * len(row["response_ids"])
    assert trained == masks[: len(trained)]
    assert not any(masks[len(trained) :])


@pytest.mark.parametrize(
    ("template", "response", "trained"),
    [
        (GEMMA, "  A B\n", "A B<end_of_turn>"),  # the template trims
        (CHATML, "\nA", "\nA<|im_end|>"),  # "\n\n" across the border may be one token
        (QWEN3, "<think>\nso\n</think>\n\nA", "<think>\nso\n</think>\n\nA<|im_end|>"),
        (DEEPSEEK, "so <b>A</b>", "so <b>A</b><|eos|>"),
    ],
)
def test_responses(template: str, response: str, trained: str) -> None:
    encoder, row = _encode(template, "Q", response)
    assert encoder.tokenizer.decode(row["response_ids"]) == trained
    assert encoder.tokenizer.decode(row["prompt_ids"]) == row["prompt"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (R1, r"does not go on from its prompt: where the prompt has '<think>\\n', the conversation .* has 'Hello"),
        (
            CHATML.replace("m['content']", "(m['content'] if loop.first else m['content'] | upper)"),
            "renders the answer 'Hello' as 'HELLO<|im_end|>",
        ),
        (
            CHATML.replace("m['content'] +", "(m['content'] if loop.first else '') +"),
            "renders the answer 'Hello' as '<|im_end|>",
        ),
        (PLAIN_TEXT, r"ends the assistant's turn with '\\n', which holds no token of its own"),
        ("<bos>{{ messages[0]['content'][0]['text'] }}", "renders the question 'Question' as '<bos>', without it"),
        (CHATML.replace("m['content']", "m['content'].strip(1)"), r"refuses the turns user \(TypeError"),
        ("{{ raise_exception('tools only') }}", r"refuses the turns user \(TemplateError: tools only\)"),
        (
            CHATML + "{% if messages | length > 1 %}{{ raise_exception('one turn') }}{% endif %}",
            "turns user, assistant .*one turn",
        ),
        (None, "has no chat template; use --data.prompt_style plain"),
    ],
)
def test_templates_that_cannot_be_trained_on(template: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("|", r"\|")) as error:
        PromptEncoder(tokenizer(template), "chat", "")
    assert "--data.prompt_style plain" in str(error.value)


def test_marks_that_the_tokenizer_does_not_have() -> None:
    with pytest.raises(ValueError, match=r"with '<\|im_end\|>\\n', which holds no token of its own"):
        PromptEncoder(tokenizer(CHATML, marks=["<bos>"]), "chat", "")


@pytest.mark.parametrize(
    ("template", "response", "message"),
    [
        (DEEPSEEK, "<think>so</think>A", "renders the response '<think>so</think>A' as 'A<|eos|>': it leaves out"),
        (CHATML, "A<|im_end|>", "holds '<|im_end|>', which ends the assistant's turn"),
        (_changed("m['content'] | replace('5', 'five')"), "5 boxes", "renders the response '5 boxes' as 'five boxes"),
    ],
)
def test_responses_that_a_template_changes(template: str, response: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        _encode(template, "Q", response)


class Rows(InstructionDataModule):
    def load_examples(self, split: Split) -> list[Example] | None:
        return None if split == "val" else [Example(f"Q{number}", f"A{number}") for number in range(5)]


def test_batches_end_with_the_turn(tmp_path: Path) -> None:
    tokenizer(GEMMA, eos="<eos>").save_pretrained(tmp_path / "tokenizer")
    module = Rows(str(tmp_path / "tokenizer"), prompt_style="chat", val_size=1, cache_dir=str(tmp_path))
    module.prepare_data()
    module.setup()
    chat = module.encoder.tokenizer
    end = chat.convert_tokens_to_ids("<end_of_turn>")
    assert module.end_id == end != chat.eos_token_id
    for loader in (module.train_dataloader(), module.val_dataloader(), module.test_dataloader()):
        for batch in loader:
            for labels in batch["labels"]:
                trained = labels[labels != IGNORED].tolist()
                assert chat.decode(trained)[0] == "A"
                assert trained[-1] == end
                assert chat.eos_token_id not in trained
    assert torch.equal(batch["end_id"], torch.full((len(batch["id"]),), end))


def test_a_tokenizer_whose_only_end_is_that_of_the_turn(tmp_path: Path) -> None:
    made = tokenizer(GEMMA)
    made.eos_token = None
    made.pad_token = None
    made.save_pretrained(tmp_path / "tokenizer")
    module = Rows(str(tmp_path / "tokenizer"), prompt_style="chat", val_size=0, cache_dir=str(tmp_path))
    module.setup("fit")
    assert next(iter(module.train_dataloader()))["input_ids"].shape[0] == 5


def test_the_cache_knows_the_template_and_the_tokens_that_it_names() -> None:
    examples = [Example("Q", "A")]
    made = [tokenizer(GEMMA), tokenizer(CHATML), tokenizer(GEMMA.replace("'<bos>'", "bos_token")), tokenizer(GEMMA)]
    made[3].bos_token = MARKS[1]
    found = [PromptEncoder(each, "chat", "").fingerprint(examples) for each in made]
    assert len(set(found)) == 4
    assert PromptEncoder(tokenizer(GEMMA), "chat", "").fingerprint(examples) == found[0]


def test_a_tokenizer_with_several_templates() -> None:
    made = tokenizer(None)
    made.chat_template = {"default": CHATML, "tool_use": "{{ raise_exception('tools') }}"}
    row = PromptEncoder(made, "chat", "")({"question": ["Q"], "response": ["A"]})
    assert made.decode(row["response_ids"][0]) == "A<|im_end|>"


@pytest.mark.parametrize("name", TEMPLATES)
def test_choice_by_likelihood_reads_labels_as_the_template_puts_them(name: str) -> None:
    encoder = PromptEncoder(tokenizer(TEMPLATES[name].template), "chat", "")
    question = "Which? Answer format: answer1/answer2"
    stated = [f"the correct answer is {label}" for label in ("answer1", "answer2")]
    rows = encoder({"question": [question] * 2, "response": stated})
    one, two = rows["response_ids"]
    examples = [{"id": 0, "target": ["ARC-Easy", "answer1"], **{key: value[0] for key, value in rows.items()}}]
    batch = InstructionCollator(0, evaluation=True, end_id=encoder.end_id)(examples)
    assert candidates(CommonsenseAccuracy(), encoder.tokenizer, batch) == [{"answer1": one[:-1], "answer2": two[:-1]}]
