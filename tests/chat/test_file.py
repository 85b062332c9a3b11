"""``generate``: a file of prompts, in order, also after a stop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_pmss.chat.model import ChatModel
from lightning_pmss.chat.prompts import read_prompts
from lightning_pmss.cli import main
from tests.chat.conftest import Answer

QUESTIONS = ["How many eggs are left?", "Hi", "A train travels 60 miles in one hour.", "Question: 3 * 4?", "pens"]


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    file = tmp_path / "prompts.txt"
    file.write_text("\n\n".join(QUESTIONS) + "\n")
    return str(file)


def generate(model: str, prompts: str, *more: object) -> None:
    main(["generate", "--model", model, "--prompts", prompts, "--max-new-tokens", "8", *map(str, more)])


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def fail(*args: object) -> None:
    with pytest.raises(SystemExit) as stop:
        generate(*args)  # type: ignore[arg-type]
    assert stop.value.code == 2


def test_answers_in_the_order_of_the_file(
    tiny_llama: str, prompts: str, tmp_path: Path, plainly: Answer, adapters: dict[str, str]
) -> None:
    for name, adapter, options in (("base", None, ()), ("red", adapters["red"], ("--adapter", adapters["red"]))):
        generate(tiny_llama, prompts, "--output", tmp_path / f"{name}.jsonl", "--batch-size", 2, *options)
        rows = read(tmp_path / f"{name}.jsonl")
        assert [row["id"] for row in rows] == [0, 1, 2, 3, 4]
        wanted = [plainly([{"role": "user", "content": question}], adapter) for question in QUESTIONS]
        assert [row["output"] for row in rows] == wanted
        assert all(question in row["prompt"] for question, row in zip(QUESTIONS, rows, strict=True))
    assert not list(tmp_path.glob("*.unfinished"))


def test_without_an_output_they_are_printed(
    tiny_llama: str, prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate(tiny_llama, prompts, "--batch-size", 2)
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    generate(tiny_llama, prompts, "--output", tmp_path / "a.jsonl")
    assert printed == read(tmp_path / "a.jsonl")


def test_messages_with_ids_and_a_system_message(tiny_llama: str, tmp_path: Path, plainly: Answer) -> None:
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes"},
        {"role": "user", "content": "?"},
    ]
    file, output = tmp_path / "p.jsonl", tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in ({"id": "x", "messages": turns}, {"prompt": "Hi"})))
    generate(tiny_llama, str(file), "--output", output, "--system", "Be brief.")
    rows = read(output)
    assert [row["id"] for row in rows] == ["x", 1]
    assert rows[0]["output"] == plainly([{"role": "system", "content": "Be brief."}, *turns])


@pytest.mark.parametrize("options", [(), ("--temperature", "1.2", "--seed", "3")])
def test_a_stopped_run_continues(
    tiny_llama: str,
    prompts: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
) -> None:
    generate(tiny_llama, prompts, "--output", tmp_path / "whole.jsonl", "--batch-size", 2, *options)
    asked: list[int] = []
    answer = ChatModel.answer

    def stopping(self: ChatModel, rows: Any, given: Any, streamer: Any = None) -> list[str]:
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(len(rows))
        return answer(self, rows, given, streamer)

    output = tmp_path / "a.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(ChatModel, "answer", stopping)
        with pytest.raises(SystemExit) as stop:
            generate(tiny_llama, prompts, "--output", output, "--batch-size", 2, *options)
    assert stop.value.code == 130
    assert "4 of 5 answers are kept; the same command continues." in capsys.readouterr().err
    assert not output.exists()
    # Other options would mix two runs.
    fail(tiny_llama, prompts, "--output", output, "--batch-size", 2, *options, "--stop", "#")
    assert "another run (stop: [] there, ['#'] now)" in capsys.readouterr().err
    # A kill within the last line: the row is computed again.
    (part,) = (tmp_path / "a.jsonl.unfinished").glob("*.rank0.jsonl")
    part.write_bytes(part.read_bytes()[:-10])
    with monkeypatch.context() as patch:
        patch.setattr(ChatModel, "answer", lambda s, rows, *more: (asked.append(len(rows)), answer(s, rows, *more))[1])
        generate(tiny_llama, prompts, "--output", output, "--batch-size", 2, *options)
    assert asked == [2, 2, 2, 1]
    assert read(output) == read(tmp_path / "whole.jsonl")
    assert not list(tmp_path.glob("*.unfinished"))


def test_an_output_is_replaced_on_request_only(
    tiny_llama: str, prompts: str, tmp_path: Path, adapters: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "a.jsonl"
    generate(tiny_llama, prompts, "--output", output)
    first = output.read_bytes()
    fail(tiny_llama, prompts, "--output", output)
    assert "exists. To replace it give --overwrite" in capsys.readouterr().err
    generate(tiny_llama, prompts, "--output", output, "--overwrite", "--adapter", adapters["red"])
    assert output.read_bytes() != first
    (tmp_path / "notes.jsonl").write_text("mine\n")
    fail(tiny_llama, prompts, "--output", tmp_path / "notes.jsonl", "--overwrite")
    assert "is no file of answers, so it is not replaced" in capsys.readouterr().err
    fail(tiny_llama, prompts, "--output", prompts, "--overwrite")
    assert "is the file of prompts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", "{", "line 1 is not JSON"),
        ("p.jsonl", '{"prompt": "a"}\n{"text": "a"}', 'line 2: give an object with either "prompt" or "messages"'),
        ("p.jsonl", '{"prompt": ["a"]}', "is no turn of two texts"),
        ("p.jsonl", '{"prompt": " "}', "the last turn is to be the user's"),
        ("p.jsonl", '{"messages": [{"role": "assistant", "content": "a"}]}', "the last turn is to be the user's"),
        ("p.jsonl", '{"messages": []}', "is no list of turns"),
        ("p.jsonl", '{"id": 1.5, "prompt": "a"}', "give a whole number or a text"),
        ("p.jsonl", '{"id": 1, "prompt": "a"}\n{"id": 1, "prompt": "b"}', "line 2 has the id 1 of line 1"),
        (
            "p.jsonl",
            '{"prompt": "a", "system": "In French."}',
            "line 1: `system` would not be read. A system text is the",
        ),
        ("p.jsonl", '{"messages": [{"role": "user", "content": "a", "name": "b"}]}', "`name` would not be read"),
        ("p.txt", "\n \n", "contains no prompt"),
        ("p.csv", "a", "give a .txt file"),
        ("p.txt", b"\xff\xfe", "is no text in UTF-8"),
    ],
)
def test_prompts_that_are_none(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"p\.") as refused:
        read_prompts(str(file))
    assert message in str(refused.value)


def test_a_prompt_that_is_too_long_names_its_line(
    tiny_llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "p.txt"
    file.write_text("short\n" + "x" * 490)
    fail(tiny_llama, str(file), "--output", tmp_path / "a.jsonl")
    err = capsys.readouterr().err
    assert "p.txt line 2: the prompt has " in err
    assert "the model reads 512; " in err
    assert not list(tmp_path.glob("a.jsonl*"))


def test_one_adapter_at_a_time(tiny_llama: str, prompts: str, capsys: pytest.CaptureFixture[str]) -> None:
    fail(tiny_llama, prompts, "--adapter", "a", "b")
    assert "run it once for each" in capsys.readouterr().err
