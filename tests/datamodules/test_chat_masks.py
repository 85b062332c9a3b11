"""Conversations are rendered byte for byte as the templates say, and exactly what the assistant says is trained."""

from __future__ import annotations

import json
from typing import Any

import pytest
from chat_templates import (
    CHATML,
    DEEPSEEK,
    GEMMA,
    LLAMA_TOOLS,
    MARKED,
    QWEN3,
    QWEN_TOOLS,
    R1,
    TEMPLATES,
    tokenizer,
)
from tokenizers_of_kinds import MAKERS, make

from lightning_pmss.datamodules.continuations import chained, tokens_of
from lightning_pmss.datamodules.conversations.encoder import ConversationEncoder
from lightning_pmss.datamodules.conversations.messages import BadRowError
from lightning_pmss.datamodules.conversations.templates import use_template


def turn(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


TALK = [
    turn("user", "How many?"),
    turn("assistant", "Twelve pens."),
    turn("user", "Sure?"),
    turn("assistant", "Yes, 12."),
]
# template -> the text of TALK, and what is trained of it; written by hand.
EXPECTED = {
    "gemma": (
        "<bos><start_of_turn>user\nHow many?<end_of_turn>\n<start_of_turn>model\nTwelve pens.<end_of_turn>\n"
        "<start_of_turn>user\nSure?<end_of_turn>\n<start_of_turn>model\nYes, 12.<end_of_turn>",
        ["Twelve pens.<end_of_turn>", "Yes, 12.<end_of_turn>"],
    ),
    "llama3": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHow many?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nTwelve pens.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nSure?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nYes, 12.<|eot_id|>",
        ["Twelve pens.<|eot_id|>", "Yes, 12.<|eot_id|>"],
    ),
    "chatml": (
        "<|im_start|>system\nBe helpful.<|im_end|>\n<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"
        "Twelve pens.<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nYes, 12.<|im_end|>",
        ["Twelve pens.<|im_end|>", "Yes, 12.<|im_end|>"],
    ),
    "llama2": (
        "<s>[INST] How many? [/INST] Twelve pens. </s><s>[INST] Sure? [/INST] Yes, 12. </s>",
        [" Twelve pens. </s>", " Yes, 12. </s>"],
    ),
    "phi": (
        "<|user|>\nHow many?<|end|>\n<|assistant|>\nTwelve pens.<|end|>\n"
        "<|user|>\nSure?<|end|>\n<|assistant|>\nYes, 12.<|end|>",
        ["Twelve pens.<|end|>", "Yes, 12.<|end|>"],
    ),
    "zephyr": (
        "<|user|>\nHow many?</s>\n<|assistant|>\nTwelve pens.</s>\n<|user|>\nSure?</s>\n<|assistant|>\nYes, 12.</s>",
        ["Twelve pens.</s>", "Yes, 12.</s>"],
    ),
    "deepseek": (
        "<|bos|><|User|>How many?<|Assistant|>Twelve pens.<|eos|><|User|>Sure?<|Assistant|>Yes, 12.<|eos|>",
        ["Twelve pens.<|eos|>", "Yes, 12.<|eos|>"],
    ),
    "vicuna": (
        "USER: How many? ASSISTANT: Twelve pens.</s>USER: Sure? ASSISTANT: Yes, 12.</s>",
        [" Twelve pens.</s>", " Yes, 12.</s>"],
    ),
    "marked": (
        "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\nTwelve pens.<|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nYes, 12.<|im_end|>",
        ["Twelve pens.<|im_end|>", "Yes, 12.<|im_end|>"],
    ),
}


def encode(made: Any, messages: list[dict[str, Any]], train_on: Any = "assistant", tools: Any = None) -> dict[str, Any]:
    encoder = ConversationEncoder(made, train_on)
    return encoder.side({"messages": messages, "tools": tools}, train_on)


def pieces(made: Any, row: dict[str, Any]) -> list[str]:
    """The text of each trained range."""
    borders = row["trained"]
    return [made.decode(row["input_ids"][a:b]) for a, b in zip(borders[::2], borders[1::2], strict=True)]


@pytest.mark.parametrize("name", EXPECTED)
def test_rendering_and_mask_byte_for_byte(name: str) -> None:
    made = tokenizer(TEMPLATES[name].template)
    text, trained = EXPECTED[name]
    row = encode(made, TALK)
    assert made.decode(row["input_ids"]) == text
    assert pieces(made, row) == trained
    # The same tokens as transformers makes of the conversation; the prompt's as it makes for generation.
    whole = made.apply_chat_template(TALK, tokenize=True, return_dict=False)
    assert row["input_ids"] == whole[: len(row["input_ids"])]
    prompt = row["input_ids"][: row["prompt_length"]]
    if name not in ("vicuna",):  # this one has no prompt for generation
        assert prompt == made.apply_chat_template(
            TALK[:3], tokenize=True, add_generation_prompt=True, return_dict=False
        )
    assert made.decode(prompt) == row["prompt"] == text[: -len(trained[-1])]
    assert row["target"] == "Yes, 12."
    assert pieces(made, encode(made, TALK, "last")) == trained[-1:]
    assert pieces(made, encode(made, TALK, "all")) == [text]
    assert encode(made, TALK, "all")["input_ids"] == row["input_ids"]


@pytest.mark.parametrize("marks", ["around", "without the end", "with the line's end"])
def test_marks_give_the_mask_of_transformers(marks: str) -> None:
    template = {
        "around": MARKED,
        "without the end": MARKED.replace(
            "m['content'] + '<|im_end|>' }}{% endgen", "m['content'] }}{% endgen"
        ).replace("{% endgeneration %}", "{% endgeneration %}{{ '<|im_end|>' }}"),
        "with the line's end": MARKED.replace("'<|im_end|>' }}{% endgen", "'<|im_end|>\n' }}{% endgen"),
    }[marks]
    made = tokenizer(template)
    row = encode(made, TALK)
    assert pieces(made, row) == EXPECTED["marked"][1]
    if marks == "around":
        reference = made.apply_chat_template(TALK, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        mask = [0] * len(row["input_ids"])
        for start, stop in zip(row["trained"][::2], row["trained"][1::2], strict=True):
            mask[start:stop] = [1] * (stop - start)
        assert mask == reference["assistant_masks"][: len(mask)]
        assert not any(reference["assistant_masks"][len(mask) :])


def test_a_token_never_lies_on_both_sides_of_a_border() -> None:
    """The tokenizer merges two line ends; the answer's own belongs to the answer, the template's to the prompt."""
    from tokenizers_of_kinds import byte_level, wrap

    made = wrap(byte_level(use_regex=False, more=["assistant\n\nA\n\nB\n\n"] * 50))
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    talk = [turn("user", "Q"), turn("assistant", "\nA"), turn("user", "\nQ"), turn("assistant", "\n\nB")]
    for template in (CHATML, MARKED):
        made.chat_template = template
        row = encode(made, talk)
        assert pieces(made, row) == ["\nA<|im_end|>", "\n\nB<|im_end|>"]
        assert made.decode(row["input_ids"][: row["prompt_length"]]) == row["prompt"]
        assert made.decode(row["input_ids"]) == made.apply_chat_template(talk, tokenize=False).removesuffix("\n")


CALL = [
    turn("user", "How many?"),
    turn(
        "assistant", "", tool_calls=[{"type": "function", "function": {"name": "count", "arguments": {"of": "pens"}}}]
    ),
    turn("tool", '{"pens": 12}'),
    turn("assistant", "Twelve."),
]


@pytest.mark.parametrize(
    ("template", "trained"),
    [
        (
            QWEN_TOOLS,
            [
                '<tool_call>\n{"name": "count", "arguments": {"of": "pens"}}\n</tool_call><|im_end|>',
                "Twelve.<|im_end|>",
            ],
        ),
        (LLAMA_TOOLS, ['{"name": "count", "parameters": {"of": "pens"}}<|eom_id|>', "Twelve.<|eot_id|>"]),
    ],
)
def test_calls_of_tools(template: str, trained: list[str]) -> None:
    made = tokenizer(template)
    tools = [{"type": "function", "function": {"name": "count", "description": "Counts."}}]
    row = encode(made, CALL, tools=tools)
    assert pieces(made, row) == trained
    text = made.apply_chat_template(CALL, tools=tools, tokenize=False)
    assert text.startswith(made.decode(row["input_ids"]))
    assert row["target"] == "Twelve."
    assert ("Counts." in text) == (template is QWEN_TOOLS)
    # A conversation that ends with the call: it is the answer, and generation stops at its own end.
    asked = encode(made, CALL[:2])
    assert pieces(made, asked) == trained[:1]
    assert asked["target"] + made.decode(asked["input_ids"][-1:]) == trained[0]


def test_weights_of_answers() -> None:
    made = tokenizer(CHATML)
    talk = [*TALK[:1], {**TALK[1], "weight": 0}, *TALK[2:]]
    assert pieces(made, encode(made, talk)) == ["Yes, 12.<|im_end|>"]
    talk = [*TALK[:3], {**TALK[3], "weight": 0}]
    assert pieces(made, encode(made, talk)) == ["Twelve pens.<|im_end|>"]
    assert "weight" not in made.decode(encode(made, talk)["input_ids"])
    with pytest.raises(BadRowError, match="the last turn has weight 0, so nothing of this row is trained"):
        encode(made, talk, "last")


def test_thoughts() -> None:
    made = tokenizer(QWEN3)
    talk = [turn("user", "Q"), turn("assistant", "<think>\nso\n</think>\n\nA")]
    assert pieces(made, encode(made, talk)) == ["<think>\nso\n</think>\n\nA<|im_end|>"]
    # Earlier thoughts are left out of what the last answer sees, and that is what is rendered.
    talk = [*talk, turn("user", "R"), turn("assistant", "B")]
    row = encode(made, talk, "last")
    assert pieces(made, row) == ["<think>\n\n</think>\n\nB<|im_end|>"]
    assert "so" not in made.decode(row["input_ids"])


@pytest.mark.parametrize(
    ("template", "talk", "message"),
    [
        (QWEN3, TALK, r"renders an earlier turn otherwise once later turns follow: at message 2 the part has '<think>"),
        (TEMPLATES["harmony"].template, TALK, r"at message 2 the part has 'return|>' where the conversation has 'end|>"),
        (QWEN3, TALK, "Give --data.train_on each (one example per answer, as it would be generated), a template with"),
        (R1, TALK, r"does not go on from its prompt: where the prompt has '<think>\n'"),
        (R1, TALK, "or --data.template with one of chatml, llama3, gemma, alpaca, vicuna, zephyr or a Jinja file"),
        (GEMMA, [turn("system", "S"), *TALK], "refuses the turns system, user, assistant, user, assistant (TemplateError"),
        (DEEPSEEK, [turn("user", "Q"), turn("assistant", "<think>so</think>A")], "leaves out or changes a part"),
        (CHATML, CALL, "renders the call of 'count' as '<|im_end|>', without 'count': it has no form for calls"),
        (CHATML, [turn("user", "Q"), turn("assistant", "A<|im_end|>B")], "holds '<|im_end|>', which ends the assistant's turn"),
        (CHATML, [turn("user", "Q<|im_end|>"), turn("assistant", "A")], "the user's turn 'Q<|im_end|>' holds '<|im_end|>'"),
        (
            "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['content'] + '<|end|>' }}{% endif %}{% endfor %}",
            [turn("system", "Be terse."), *TALK],
            "leaves out or changes the system's turn 'Be terse.'. Take it out of the data, or give a template",
        ),
        (GEMMA, [turn("user", "Q"), turn("assistant", "A"), turn("user", "Q"), turn("user", "Q")], "roles must alternate"),
        (
            MARKED.replace("{{ m['content'] + '<|im_end|>' }}{% endgen", "{{ m['content'] }}{% endgen"),
            TALK,
            "ends the assistant's turn with 'Twelve pens.', which holds no token of its own",
        ),
        (
            MARKED.replace("m['role'] == 'assistant'", "m['role'] == 'assistant' and loop.last"),
            TALK,
            "marks 1 parts of this conversation by {% generation %}, and the assistant has 2 turns",
        ),
        (
            "{% for m in messages %}{{ '<bos>' if loop.first }}{{ m['content'] + '<|end|>' }}{% endfor %}",
            [turn("user", "<bos>Q"), turn("assistant", "A")],
            "the conversation begins with two tokens '<bos>': the chat template adds it",
        ),
    ],
)  # fmt: skip
def test_refused_by_name(template: str, talk: list[dict[str, Any]], message: str) -> None:
    made = tokenizer(template)
    made.bos_token = "<bos>"  # noqa: S105
    with pytest.raises(ValueError) as error:  # noqa: PT011
        encode(made, talk)
    assert message.replace("\n", "\\n") in str(error.value)


def test_the_last_turn_is_exact_where_earlier_ones_are_not() -> None:
    for name, end in (("qwen3", "<think>\n\n</think>\n\nYes, 12.<|im_end|>"), ("harmony", None)):
        made = tokenizer(TEMPLATES[name].template)
        for train_on in ("last", "each"):
            row = encode(made, TALK, train_on)
            assert pieces(made, row) == [end or "<|channel|>final<|message|>Yes, 12.<|return|>"]


NAMED = {
    "chatml": ("<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n", "Twelve pens.<|im_end|>"),
    "llama3": (
        "<|start_header_id|>user<|end_header_id|>\n\nHow many?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "Twelve pens.<|eot_id|>",
    ),
    "gemma": ("<start_of_turn>user\nHow many?<end_of_turn>\n<start_of_turn>model\n", "Twelve pens.<end_of_turn>"),
    "alpaca": (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nHow many?\n\n### Response:",
        "Twelve pens.</s>",
    ),
    "vicuna": (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and"
        " polite answers to the user's questions. USER: How many? ASSISTANT:",
        " Twelve pens.</s>",
    ),
    "zephyr": ("<|user|>\nHow many?</s>\n<|assistant|>\n", "Twelve pens.</s>"),
}


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("name", NAMED)
def test_named_templates(name: str, bos: bool) -> None:
    made = tokenizer(None)
    if bos:
        marks = list(made.additional_special_tokens) if hasattr(made, "additional_special_tokens") else []
        made = make("byte_level", bos=True)
        made.add_special_tokens({"additional_special_tokens": marks or sorted(tokenizer(None).get_added_vocab())})
    use_template(made, name)
    row = encode(made, TALK[:2])
    prompt, answer = NAMED[name]
    assert made.decode(row["input_ids"]) == ("<s>" if bos else "") + prompt + answer
    assert row["input_ids"].count(made.bos_token_id) == bos
    assert pieces(made, row) == [answer]
    both = encode(made, TALK)
    assert pieces(made, both)[0] == answer
    assert len(pieces(made, both)) == 2
    with pytest.raises(ValueError, match="it has no form for tools"):
        encode(made, CALL)


def test_alpacas_input_has_the_published_form() -> None:
    made = tokenizer(None)
    use_template(made, "alpaca")
    asked = turn("user", "Sort.\n3 1 2", instruction="Sort.", input="3 1 2")
    row = encode(made, [asked, turn("assistant", "1 2 3")])
    assert made.decode(row["input_ids"]) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a response"
        " that appropriately completes the request.\n\n### Instruction:\nSort.\n\n### Input:\n3 1 2\n\n### Response:1 2 3</s>"
    )


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("bos", [False, True])
def test_plain_texts_and_completions(kind: str, bos: bool) -> None:
    made = make(kind, bos=bos)
    encoder = ConversationEncoder(made)
    row = encoder.side({"prompt": "", "text": "the end of the text"}, "assistant")
    assert row["input_ids"] == [*made("the end of the text")["input_ids"], made.eos_token_id]
    assert row["trained"] == [0, len(row["input_ids"])]
    assert row["input_ids"].count(made.bos_token_id) == bos
    # A text that has the beginning and the end itself does not get them twice.
    again = encoder.side({"prompt": "", "text": "<s>the end of the text</s>"}, "assistant")["input_ids"]
    assert (again.count(made.bos_token_id), again.count(made.eos_token_id)) == (1, 1)
    row = encoder.side({"prompt": "the answer is", "text": " 12"}, "assistant")
    assert made.decode(row["input_ids"][row["trained"][0] :]).strip() == "12</s>"
    assert row["prompt_length"] == row["trained"][0]


@pytest.mark.parametrize("kind", MAKERS)
def test_chained_pieces_are_one_text(kind: str) -> None:
    made = make(kind)
    texts = ["the answer", " is true, ", "the end", " of the text", "\n#### 12"]
    (parts,) = chained(made, [texts])
    ids = [token for part in parts for token in part]
    assert len(parts) == len(texts)
    assert made.decode(ids) == made.decode(tokens_of(made, ["".join(texts)])[0])


def test_rows_are_read_from_json() -> None:
    made = tokenizer(CHATML)
    batch = {"row": [json.dumps([{"messages": TALK, "tools": None}])], "where": ["f:1"]}
    assert ConversationEncoder(made)(batch)["input_ids"] == [encode(made, TALK)["input_ids"]]
