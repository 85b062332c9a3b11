"""Layouts of conversations are recognised; bad rows are refused by file and line, or skipped and counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chat_templates import CHATML, QWEN_TOOLS, tokenizer
from test_chat_masks import CALL, TALK, turn

from lightning_pmss.datamodules import ChatDataModule
from lightning_pmss.datamodules.conversations.formats import Layout
from lightning_pmss.datamodules.conversations.messages import BadRowError


@pytest.fixture(scope="session")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tokenizer with ChatML as its template."""
    folder = tmp_path_factory.mktemp("chatml")
    tokenizer(CHATML).save_pretrained(folder)
    return str(folder)


def sides(row: Any, **layout: Any) -> list[Any]:
    made = Layout(**layout)
    return made.read("f:1", row, made.recognise("f:1", row))


SHAREGPT = [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "Twelve pens."}]
ASKED = [turn("user", "How many?"), turn("assistant", "Twelve pens.")]
SAME = {
    "messages": {"messages": ASKED},
    "messages as JSON": {"messages": json.dumps(ASKED)},
    "parts of a text": {"messages": [turn("user", [{"type": "text", "text": "How many?"}]), ASKED[1]]},  # type: ignore[arg-type]
    "with other columns": {"messages": ASKED, "id": 7, "source": "web", "tools": None},
    "ShareGPT": {"conversations": SHAREGPT},
    "ShareGPT with roles": {"conversations": ASKED},
    "Alpaca": {"instruction": "How many?", "input": "", "output": "Twelve pens."},
    "Stanford's": {"instruction": "How many?", "input": "", "output": "Twelve pens.", "text": "Below is ..."},
    "prompt and completion": {"prompt": "How many?", "completion": "Twelve pens."},
    "prompt and completion as messages": {"prompt": ASKED[:1], "completion": ASKED[1:]},
}


@pytest.mark.parametrize("name", SAME)
def test_layouts_say_the_same(name: str) -> None:
    assert sides(SAME[name]) == [{"messages": ASKED, "tools": None}]


def test_more_of_the_layouts() -> None:
    row = {"instruction": "Sort.", "input": "3 1", "output": "1 3", "system": "S", "history": [["a", "b"]]}
    (side,) = sides(row)
    assert [(m["role"], m["content"]) for m in side["messages"]] == [
        ("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "Sort.\n3 1"), ("assistant", "1 3")
    ]  # fmt: skip
    assert sides({"text": "any text"}) == [{"prompt": "", "text": "any text"}]
    assert sides({"prompt": "a", "completion": "b"}, plain=True) == [{"prompt": "a", "text": "b"}]
    # OpenAI's calls have JSON texts for arguments, and ShareGPT's are a turn of their own; templates read objects.
    openai = [
        CALL[0],
        turn(
            "assistant",
            "",
            tool_calls=[{"id": "1", "type": "function", "function": {"name": "count", "arguments": '{"of": "pens"}'}}],
        ),
    ]
    (side,) = sides(
        {"messages": [openai[0], {**openai[1], "content": None}, {**CALL[2], "tool_call_id": "1"}, CALL[3]]}
    )
    assert side["messages"][1]["tool_calls"] == [{**CALL[1]["tool_calls"][0], "id": "1"}]
    (side,) = sides(
        {
            "conversations": [
                {"from": "human", "value": "How many?"},
                {"from": "function_call", "value": '{"name": "count", "arguments": {"of": "pens"}}'},
                {"from": "observation", "value": '{"pens": 12}'},
                {"from": "gpt", "value": "Twelve."},
            ],
            "tools": '[{"name": "count"}]',
        }
    )
    assert side == {"messages": CALL, "tools": [{"name": "count"}]}


def test_preferences() -> None:
    other = turn("assistant", "Ten pens.")
    wanted = [{"messages": ASKED, "tools": None}, {"messages": [ASKED[0], other], "tools": None}]
    for row in (
        {"prompt": "How many?", "chosen": "Twelve pens.", "rejected": "Ten pens."},
        {"prompt": ASKED[:1], "chosen": ASKED[1:], "rejected": [other]},
        {"prompt": "How many?", "chosen": ASKED, "rejected": [ASKED[0], other], "score_chosen": 9.0, "messages": ASKED},
        {"chosen": ASKED, "rejected": [ASKED[0], other]},
    ):
        assert sides(row) == wanted


def test_columns_and_roles_of_ones_own() -> None:
    row = {"q": "How many?", "a": "Twelve pens."}
    assert sides(row, columns={"instruction": "q", "output": "a"}) == sides(SAME["Alpaca"])
    row = {"dialogue": [{"role": "customer", "content": "How many?"}, {"role": "agent", "content": "Twelve pens."}]}
    layout: Any = {"columns": {"messages": "dialogue"}, "roles": {"customer": "user", "agent": "assistant"}}
    assert sides(row, **layout) == sides(SAME["messages"])
    with pytest.raises(BadRowError, match=r"f:1: no column 'x', which --data.columns gives for 'output'; found a, q\."):
        sides({"q": "1", "a": "2"}, columns={"output": "x"})


# What stands in line 2 behind a good row of messages, and the message about it behind "FILE:2: ".
BAD: list[tuple[Any, str]] = [
    ('{"messages": [', "not valid JSON (Expecting value at column 15)."),
    ("[1]", "expected a JSON object with messages, got list."),
    ({}, "no column 'messages'; found []."),
    ({"messages": []}, "'messages' is an empty list; a conversation needs a user's and an assistant's turn."),
    ({"messages": None}, "'messages' is None; it must be a list of messages."),
    ({"messages": "hello"}, "'messages' is 'hello', which is no JSON (Expecting value)."),
    ({"messages": {"role": "user"}}, "'messages' is {'role': 'user'}; it must be a list of messages."),
    ({"messages": ["hi"]}, "message 1 of 'messages' is 'hi'; it must be an object with role and content, or from and value."),
    ({"messages": [{"content": "a"}]}, "message 1 of 'messages' has neither 'role' nor 'from', but ['content']."),
    ({"messages": [turn("customer", "a")]}, "message 1 of 'messages' has the role 'customer'; known are human, user, "),
    ({"messages": [turn("user", "")]}, "message 1 of 'messages', the user's, is empty ('')."),
    ({"messages": [turn("user", "a"), turn("assistant", " \n")]}, "message 2 of 'messages', the assistant's, is empty ('"),
    ({"messages": [turn("user", "a"), {"role": "assistant"}]}, "message 2 of 'messages', the assistant's, is empty ('')."),
    ({"messages": [{"role": "user", "content": 7}]}, "message 1 of 'messages' has the content 7, int; it must be a text."),
    (
        {"messages": [turn("user", [{"type": "image_url", "image_url": "x"}])]},  # type: ignore[arg-type]
        "message 1 of 'messages' has a part of type 'image_url'; only texts are read.",
    ),
    ({"messages": [turn("user", "a")]}, "no assistant turn (the roles are user), so there is nothing to train on."),
    ({"messages": [*TALK, turn("user", "a")]}, "the last message is a user's turn, which nothing answers. Take it out, or add"),
    (
        {"messages": [TALK[1]]},
        "roles out of order: message 1 is an assistant's turn, but behind the beginning comes a system turn or a user's turn.",
    ),
    (
        {"messages": [TALK[0], *TALK]},
        "roles out of order: message 2 is a user's turn, but behind a user's turn comes an assistant's turn.",
    ),
    (
        {"messages": [*TALK[:2], TALK[1]]},
        "roles out of order: message 3 is an assistant's turn, but behind an assistant's turn comes a user's turn.",
    ),
    (
        {"messages": [*TALK[:2], turn("system", "S"), *TALK]},
        "roles out of order: message 3 is a system turn, but behind an assistant's turn comes a user's turn.",
    ),
    (
        {"messages": [TALK[0], turn("tool", "12"), TALK[1]]},
        "roles out of order: message 2 is a tool's answer, but a tool answers a call of the assistant.",
    ),
    (
        {"messages": [TALK[0], turn("assistant", "", tool_calls=[{"function": {"name": 7}}])]},
        "message 2 of 'messages' has the call {'function': {'name': 7}}; it must have a function with a name.",
    ),
    (
        {"messages": [TALK[0], turn("assistant", "", tool_calls=[{"function": {"name": "f", "arguments": "{x"}}])]},
        "message 2 of 'messages': the arguments of 'f' is '{x', which is no JSON (Expecting property name",
    ),
    (
        {"messages": [turn("user", "a", tool_calls=[{"function": {"name": "f"}}])]},
        "message 1 of 'messages' calls a function, and its role is 'user'; only the assistant calls functions.",
    ),
    ({"messages": [TALK[0], {**TALK[1], "weight": 2}]}, "message 2 of 'messages' has the weight 2; an assistant's message may"),
    ({"messages": [TALK[0], {**TALK[1], "weight": 0}]}, "all of the assistant's turns have the weight 0, so there is nothing"),
    (
        {"messages": [{**TALK[0], "mood": "sad"}, TALK[1]]},
        "message 1 of 'messages' has 'mood' filled ('sad'), which nothing reads. Leave it out on purpose:"
        " --data.ignore_columns '[messages.mood]'.",
    ),
    (
        {"messages": TALK, "context": "x"},
        "the column 'context' is filled ('x'), and messages reads 'messages' alone. Put what it says into these columns,",
    ),
    ({"messages": [turn("system", "a"), *TALK], "system": "b"}, "both the column 'system' and the first message are"),
    ({"messages": TALK, "tools": "x"}, "'tools' is 'x', which is no JSON (Expecting value)."),
    ({"messages": TALK, "tools": [7]}, "'tools' is [7]; it must be a list of objects, one for each function."),
    ({"conversations": SHAREGPT}, "this is a row of ShareGPT, and the first row of the file is one of messages."),
    ({"messages": [TALK[0], turn("assistant", "A<|im_end|>")]}, "the answer 'A<|im_end|>' holds '<|im_end|>', which ends the"),
    ({"messages": CALL}, "the chat template of '{tokenizer}' renders the call of 'count' as '<|im_end|>', without 'count'"),
    ('{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "A"}]}', "a text has '\\ud800'"),
    ('{"messages": [], "messages": []}', "an object has the key 'messages' more than once; keep one of them."),
]  # fmt: skip


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(("row", "message"), BAD)
def test_bad_rows(chatml: str, tmp_path: Path, row: Any, message: str) -> None:
    path = write(tmp_path / "rows.jsonl", {"messages": TALK}, row, {"messages": ASKED})
    options: dict[str, Any] = {"cache_dir": str(tmp_path), "val_size": 0}
    with pytest.raises(ValueError) as error:  # noqa: PT011
        ChatDataModule(chatml, path, **options).setup("fit")
    said = str(error.value)
    message = message.replace("{tokenizer}", chatml)
    assert said.startswith(f"{path}:2: {message}")
    assert said.endswith((".", "'."))
    module = ChatDataModule(chatml, path, on_bad_row="skip", **options)
    with pytest.warns(
        UserWarning, match=r"1 of 3 rows of .*rows.jsonl are bad and skipped, the first one: .*rows.jsonl:2"
    ):
        module.setup("fit")
    assert module.skipped["train"] == [said]
    assert len(module.data["train"]) == 2
    # The error comes from the cache of the run that skipped, too.
    with pytest.raises(ValueError, match=r"rows\.jsonl:2"):
        ChatDataModule(chatml, path, **options).setup("fit")


def test_there_are_thirty_bad_rows() -> None:
    assert len(BAD) >= 30


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "a", "output": ""}, "the output is ''; it must be a text that is not empty."),
        ({"instruction": "a", "output": 7}, "the output is 7; it must be a text that is not empty."),
        ({"instruction": "a", "output": "b", "history": [["x"]]}, "'history' is [['x']]; it must be a list of pairs"),
        ({"prompt": "a", "completion": None}, "the completion is None; it must be a text that is not empty."),
        ({"text": "  "}, "the text is '  '; it must be a text that is not empty."),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "'chosen' and 'rejected' are the same, so there is nothing"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "the rejected is ''; it must be a text that is not empty."),
        ({"chosen": "b", "rejected": "c"}, "no 'prompt', and 'chosen' is no whole conversation."),
        (
            {"chosen": ASKED, "rejected": [turn("user", "Other?"), turn("assistant", "Ten.")]},
            "'chosen' and 'rejected' differ before their last turn; they must answer the same.",
        ),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "x"}]}, "message 2 of 'conv"),
    ],
)  # fmt: skip
def test_bad_rows_of_other_layouts(row: dict[str, Any], message: str) -> None:
    layout = Layout()
    with pytest.raises(BadRowError) as error:
        layout.read("f:1", row, layout.recognise("f:1", row))
    assert str(error.value).startswith(f"f:1: {message}")


def test_only_bad_rows(chatml: str, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"messages": []}, "x")
    with pytest.raises(
        ValueError, match=r"no examples in this file.* All 2 rows are bad, the first one: .*:1: 'messages'"
    ):
        ChatDataModule(chatml, path, on_bad_row="skip", cache_dir=str(tmp_path)).setup("fit")
    path = write(tmp_path / "rows.jsonl", {"messages": CALL})
    with pytest.raises(ValueError, match=r"all rows are bad, the first one: .*jsonl:1: the chat template"):
        ChatDataModule(chatml, path, on_bad_row="skip", cache_dir=str(tmp_path)).setup("fit")
    with pytest.raises(ValueError, match=r"rows\.jsonl: no examples in this file"):
        ChatDataModule(chatml, write(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path)).setup("fit")


@pytest.mark.parametrize("suffix", [".json", ".parquet", ".csv"])
def test_files_of_all_kinds(chatml: str, tmp_path: Path, suffix: str) -> None:
    import csv

    from datasets import Dataset

    path = tmp_path / f"rows{suffix}"
    rows = [{"instruction": 'say "hi", twice', "input": "", "output": f"line one\nline {n}"} for n in range(3)]
    if suffix == ".json":
        path.write_text(json.dumps(rows))
    elif suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    module = ChatDataModule(chatml, str(path), val_size=0, cache_dir=str(tmp_path))
    module.setup("fit")
    assert module.data["train"]["target"][:] == [row["output"] for row in rows]
    assert 'say "hi", twice' in module.data["train"]["prompt"][0]


def test_arrow_fills_no_keys_into_calls(tmp_path: Path) -> None:
    from datasets import Dataset

    other = json.loads(json.dumps(CALL).replace('"of": "pens"', '"color": "red"'))
    Dataset.from_list([{"messages": CALL}, {"messages": other}]).to_parquet(tmp_path / "rows.parquet")
    tokenizer(QWEN_TOOLS).save_pretrained(tmp_path / "tok")
    module = ChatDataModule(str(tmp_path / "tok"), str(tmp_path / "rows.parquet"), val_size=0, cache_dir=str(tmp_path))
    module.setup("fit")
    texts = [module.tokenizer.decode(ids) for ids in module.data["train"]["input_ids"]]
    assert ["null" in text for text in texts] == [False, False]
    assert '"arguments": {"color": "red"}' in texts[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "instruction,output\na,b\nc,d,e\n",
            r"rows\.csv:3: 3 cells, and the header has 2; quote texts that have commas",
        ),
        ('instruction,output\na,b\n"c" x,d\n', r"rows\.csv:3: not valid CSV"),
        ("instruction,instruction\na,b\n", r"rows\.csv:1: the header .* has a name twice"),
        ("", "no examples in this file"),
    ],
)
def test_bad_csv(chatml: str, tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        ChatDataModule(chatml, str(path), cache_dir=str(tmp_path)).setup("fit")
