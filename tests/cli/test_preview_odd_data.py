"""What a newcomer may have for data: `preview` shows it, or ends in one message with the place and what to type instead."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_pmss.cli import main

ROW = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]}\n'
SKIP = "Correct it, or leave bad rows out: --data.on_bad_row skip."


def preview(tokenizer: str, tmp_path: Path, path: Path | str, *more: str) -> None:
    main(
        [
            "preview", "--model=CausalLMModule", f"--model.model_name_or_path={tokenizer}", "--data=ChatDataModule",
            "--data.val_size=0", f"--data.path={path}", f"--data.cache_dir={tmp_path / 'cache'}", "--trainer.accelerator=cpu",
            "--rows=1", *more,
        ]
    )  # fmt: skip


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    tokenizer, tmp_path, *rest = arguments
    with pytest.raises(SystemExit) as ended:
        preview(str(tokenizer), Path(tmp_path), *map(str, rest))
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    return printed


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bom.jsonl", b"\xef\xbb\xbf" + ROW.encode() * 2),
        ("crlf.jsonl", ROW.replace("\n", "\r\n").encode() * 2),
        ("bom.csv", b'\xef\xbb\xbfprompt,completion\r\n"a, ""b""",Yes\r\n'),
        ("one.csv", b"text\na; b | c\n"),
    ],
)
def test_files_as_other_programs_write_them(
    tiny_tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    preview(tiny_tokenizer, tmp_path, tmp_path / name)
    assert "⟦" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("case.jsonl", ROW.replace("messages", "Messages"), "case.jsonl:1: the columns Messages are those of no layout. Layouts"
         " are preferences (chosen, rejected); messages (messages); ShareGPT (conversations);"),
        ("case2.jsonl", ROW.replace("messages", "Messages"), "--data.columns '{messages: Messages}'"),
        ("other.jsonl", '{"foo": "a", "bar": "b"}\n', "the columns bar, foo are those of no layout"),
        ("list.jsonl", f"[{ROW.strip()}]\n", "got list. A file with one list of all rows is to be named .json."),
        ("number.jsonl", "5\n", "number.jsonl:1: expected a JSON object with the columns of a layout, got int."),
        ("object.json", f'{{"data": [{ROW}]}}', "got dict. Put the rows into one list, [...], or one object on each line"),
        ("semicolon.csv", "instruction;output\na;b\n", "semicolon.csv:1: the header ['instruction;output'] has ';' between"),
        ("deep.jsonl", '{"messages": ' + "[" * 100_000 + "]" * 100_000 + "}\n", "deep.jsonl:1: JSON that Python does not read"),
        ("digits.jsonl", f'{{"prompt": "a", "completion": "b", "id": {"9" * 5000}}}\n', "digits.jsonl:1: JSON that"),
        ("role.jsonl", ROW.replace('"user"', '["user"]'), f"has the role ['user'], list; it must be a text. {SKIP}"),
        ("null.jsonl", ROW.replace('"user"', "null"), f"has the role None, NoneType; it must be a text. {SKIP}"),
        ("empty.jsonl", ROW.replace('"Yes"', "null"), f"the assistant's, is empty (''). {SKIP}"),
        ("first.jsonl", ROW.replace('"user"', '"assistant"'), f"a system turn or a user's turn. {SKIP}"),
        ("system.jsonl", '{"messages": [{"role": "system", "content": "S"}]}\n', f"so there is nothing to train on. {SKIP}"),
        ("x.txt", "a", "rename, unpack or convert this one."),
    ],
)  # fmt: skip
def test_what_is_wrong_where_and_what_to_type(
    tiny_tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str, says: str
) -> None:
    (tmp_path / name).write_text(content)
    printed = refusal(capsys, tiny_tokenizer, tmp_path, tmp_path / name)
    assert says in printed
    assert name in printed


@pytest.mark.parametrize("bad", ["[" * 100_000 + "]" * 100_000, "9" * 5000])
def test_json_that_python_does_not_read_is_skipped_too(tiny_tokenizer: str, tmp_path: Path, bad: str) -> None:
    (tmp_path / "a.jsonl").write_text(f'{ROW}{{"messages": {bad}}}\n{{"messages": {json.dumps(bad)}}}\n')
    with pytest.warns(
        UserWarning, match="2 of 3 rows of .* are bad and skipped, the first one: .*a.jsonl:2: JSON that"
    ):
        preview(tiny_tokenizer, tmp_path, tmp_path / "a.jsonl", "--data.on_bad_row=skip")


def test_places_and_options(tiny_tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.jsonl").write_text(ROW)
    (tmp_path / "latin.jinja").write_bytes(b"\xe9")
    mine = tmp_path / "mine.jsonl"
    for arguments, says in (
        ([tmp_path], f"The folder has `mine.jsonl`: give a file, such as --data.path {mine}, or rename it."),
        (["org/data"], f"pass local files: --data.path FILE.jsonl; {Path('org/data').absolute()} is none."),
        ([mine, "--data.val_size=0.05"], "give a smaller --data.val_size, or 0 to train without validation."),
        ([mine, f"--data.template={tmp_path / 'latin.jinja'}"], "latin.jinja is not UTF-8"),
        ([mine, f"--html={tmp_path}"], f"--html {tmp_path} is a folder; name a file, such as"),
        ([mine, "--tokens-per-second=inf"], "--tokens-per-second inf: give a finite speed above 0."),
    ):
        assert says in refusal(capsys, tiny_tokenizer, tmp_path, *arguments)
    printed = refusal(capsys, "models/none", tmp_path, mine)  # transformers says it in several lines
    assert printed.strip().splitlines()[-1].endswith("makes models/SmolLM2-135M-Instruct without the hub.")
    assert "preview: error: Could not load the tokenizer 'models/none' (" in printed.strip().splitlines()[-1]
