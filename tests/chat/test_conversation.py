"""``chat``: what it says is what transformers says, under the adapter that was named."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_pmss import METHODS, convert, save_adapter
from lightning_pmss.chat.stream import Stream, shown
from lightning_pmss.cli import main
from lightning_pmss.conversion.convert import adapted_layers
from tests.chat.conftest import Answer

Chat = Callable[..., tuple[list[str], str]]


@pytest.fixture
def chat(tiny_llama: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Chat:
    """Type lines into the program; returns what each was answered with, and stderr."""

    def talk(*typed: str, model: str = tiny_llama, options: tuple[str, ...] = ()) -> tuple[list[str], str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in typed)))
        main(["chat", "--model", model, "--max-new-tokens", "8", *options])
        out, err = capsys.readouterr()
        head, *parts = out.split("you> ")
        return [head, *(part.partition("\n")[2].rstrip("\n") for part in parts)], err

    return talk


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_answers_are_those_of_transformers_turn_by_turn(chat: Chat, plainly: Answer) -> None:
    (head, first, second, *_), err = chat("How many pens?", "And eggs?")
    turns = [user("How many pens?")]
    assert first == f"model> {shown(plainly(turns))}"
    turns += [{"role": "assistant", "content": plainly(turns)}, user("And eggs?")]
    assert second == f"model> {shown(plainly(turns))}"
    assert "float32, on cpu; the tokenizer's chat template; greedy" in head
    assert err.count("[8 tokens, ") == 2
    assert "cut at the length limit" in err


def test_adapters_are_switched_by_name(chat: Chat, plainly: Answer, adapters: dict[str, str]) -> None:
    said, _ = chat(
        "Hello", "/adapter blue", "/again", "/adapter none", "/again", "/adapter red", "/adapter green", "/again",
        options=("--adapter", adapters["red"], f"blue={adapters['blue']}"),
    )  # fmt: skip
    alone = {name: shown(plainly([user("Hello")], adapters.get(name))) for name in ("red", "blue", "model")}
    assert len(set(alone.values())) == 3
    assert said[0].endswith("red (active)  blue  none\n")
    assert said[1] == f"red> {alone['red']}"
    assert said[2] == "red  blue (active)  none"
    assert said[3] == f"blue> {alone['blue']}"
    assert said[4] == "red  blue  none (active)"
    assert said[5] == f"model> {alone['model']}"
    assert said[7] == "no adapter is called 'green'; there are `red`, `blue`, `none`."
    assert said[8] == f"red> {alone['red']}"


def test_commands_and_messages_of_several_lines(chat: Chat, plainly: Answer) -> None:
    said, _ = chat("/again", "/nope", "/help", "One\\", "two", "/reset", "Hello", "", "/exit", "never")
    assert said[1] == "there is no question yet."
    assert said[2].startswith("there is no command /nope; /help lists them.")
    assert "/adapter NAME" in said[3]
    assert said[4].endswith(f"model> {shown(plainly([user('One' + chr(10) + 'two')]))}")
    assert said[5] == "The conversation begins again."
    assert said[6] == f"model> {shown(plainly([user('Hello')]))}"
    assert len(said) == 9  # an empty line asks nothing, and nothing follows /exit


def test_ctrl_c_ends_one_answer(chat: Chat, plainly: Answer, monkeypatch: pytest.MonkeyPatch) -> None:
    put, seen = Stream.put, []

    def interrupted(self: Stream, value: torch.Tensor) -> None:
        put(self, value)
        seen.append(value)
        if len(seen) == 5:  # the prompt and four tokens
            raise KeyboardInterrupt

    monkeypatch.setattr(Stream, "put", interrupted)
    (_, first, second, *_), err = chat("Hello", "Again?")
    part = plainly([user("Hello")], tokens=4)
    assert first == f"model> {shown(part)}"
    assert "[4 tokens, " in err
    assert ", stopped]" in err
    turns = [user("Hello"), {"role": "assistant", "content": part}, user("Again?")]
    assert second == f"model> {shown(plainly(turns))}"  # the part stays in the conversation


def test_ctrl_c_at_the_prompt_leaves(tiny_llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(prompt: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    main(["chat", "--model", tiny_llama])


def test_a_base_without_a_template(
    chat: Chat, without_template: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], plainly: Answer
) -> None:
    with pytest.raises(SystemExit) as stop:
        chat("Hello", model=without_template)
    assert stop.value.code == 2
    assert "as those of base models, and none is guessed. Give --chat-template with one of" in capsys.readouterr().err
    file = tmp_path / "template.jinja"
    file.write_text("{% for m in messages %}{{ m['content'] }}<|endoftext|>{% endfor %}")
    said, _ = chat("Hello", model=without_template, options=("--chat-template", str(file)))
    assert "the template of " in said[0]
    named, _ = chat("Hello", model=without_template, options=("--chat-template", "zephyr"))
    assert "the template 'zephyr'" in named[0]
    assert named[1] != said[1]
    continued, _ = chat("Question: Ann", model=without_template, options=("--plain",))
    assert "no chat template: it continues your text" in continued[0]
    from transformers import pipeline

    whole = pipeline("text-generation", without_template)("Question: Ann", max_new_tokens=8, do_sample=False)
    assert continued[1] == f"model> {shown(whole[0]['generated_text'].removeprefix('Question: Ann').strip())}"
    assert said[1] != continued[1]


def test_sampling_is_seeded(chat: Chat) -> None:
    options = ("--temperature", "1.5", "--top-p", "0.9", "--seed")
    (head, one, _, again, *_), _ = chat("Hello", "/reset", "Hello", options=(*options, "1"))
    assert "sampling at temperature 1.5, top-p 0.9, seed 1" in head
    assert one == again
    assert chat("Hello", options=(*options, "2"))[0][1] != one
    assert chat("Hello")[0][1] != one


def test_a_full_context_is_reported(chat: Chat, tiny_llama: str) -> None:
    said, _ = chat("x" * 600, "Hello")
    assert "tokens, and the model reads at most 512; /reset begins again." in said[1]
    assert said[2].startswith("model> ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--adapter", "none=x"], "'none' is no name for an adapter; type NAME=DIR"),
        (["--adapter", "a=x", "--adapter", "a=y"], "x is called 'a' already; type NAME=DIR"),
        (["--adapter", "nowhere"], "nowhere"),
        (["--device", "cuda:77"], "there is no such device here"),
        (["--device", "hat"], "'hat' is no device"),
        (["--top-p", "0.5"], "has no effect on greedy answers"),
        (["--temperature", "-1"], "give 0 for greedy answers"),
        (["--max-new-tokens", "0"], "at least 1"),
        (["--plain", "--system", "Be brief."], "--system would have no effect"),
        (["--chat-template", "nowhere.jinja"], "There is no chat template 'nowhere.jinja'"),
        (["--chat-template", "chat"], "Give --chat-template with one of chatml, "),
    ],
)
def test_refusals(options: list[str], message: str, tiny_llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["chat", "--model", tiny_llama, *options])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_an_adapter_of_another_base_is_refused(
    tmp_path: Path, tiny_llama: str, adapters: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    other = AutoModelForCausalLM.from_pretrained(tiny_llama)
    for parameter in other.parameters():
        parameter.data.mul_(1.5)
    other.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["chat", "--model", str(tmp_path), "--adapter", adapters["red"]])
    assert stop.value.code == 2
    assert "base" in capsys.readouterr().err


def test_adapters_of_other_templates_are_refused(
    tmp_path: Path, tiny_llama: str, adapters: dict[str, str], chat: Chat, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    own = shutil.copytree(adapters["blue"], tmp_path / "own")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.save_pretrained(own)
    both = ("--adapter", adapters["red"], f"own={own}")
    assert chat("Hello", options=both)[0][1].startswith("red> ")

    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(own)
    with pytest.raises(SystemExit) as stop:
        main(["chat", "--model", tiny_llama, *both])
    assert stop.value.code == 2
    assert f"{own} and {tiny_llama} have other chat templates" in capsys.readouterr().err
    assert chat("Hello", options=(*both, "--chat-template", "alpaca"))[0][1].startswith("red> ")

    other = AutoTokenizer.from_pretrained(tiny_llama)
    other.add_tokens(["<blue>"])
    other.save_pretrained(second := shutil.copytree(adapters["red"], tmp_path / "second"))
    tokenizer.add_tokens(["<own>"])
    tokenizer.save_pretrained(own)
    with pytest.raises(SystemExit):
        main(["chat", "--model", tiny_llama, "--adapter", str(own), str(second), "--plain"])
    assert "have tokenizers with other tokens" in capsys.readouterr().err


def test_a_merged_folder_says_what_its_adapter_says(
    chat: Chat, tmp_path: Path, tiny_llama: str, adapters: dict[str, str], plainly: Answer
) -> None:
    merged = str(tmp_path / "merged")
    main(["merge", "--base", tiny_llama, "--adapter", adapters["red"], "--output", merged])
    assert chat("Hello", model=merged)[0][1] == f"model> {shown(plainly([user('Hello')], adapters['red']))}"


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_of_any_method(method: str, tiny_llama: str, tmp_path: Path, chat: Chat, plainly: Answer) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    convert(model, METHODS[method].config_class(rank=8))
    generator = torch.Generator().manual_seed(0)
    for layer in adapted_layers(model).values():
        for value in layer.core.trained().values():
            value.data.add_(30 * torch.randn(value.shape, generator=generator))
    folder = str(save_adapter(model, tmp_path / method))
    said, _ = chat("Hello", "/adapter none", "/again", options=("--adapter", folder))
    alone = shown(plainly([user("Hello")], folder))
    assert said[1] == f"{method}> {alone}"
    assert said[3] == f"model> {shown(plainly([user('Hello')]))}"
    assert alone != shown(plainly([user("Hello")]))


class _Letters:
    """A tokenizer of letters."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(map(chr, ids))


@pytest.mark.parametrize(
    ("text", "stop", "wanted"),
    [
        ("one two Question: three", ["\nQ", "Question:"], "one two"),
        ("one Quest two", ["Question:"], "one Quest two"),
        ("one\n\n Ques", ["Question:"], "one\n\n Ques"),
        ("ab abc abcd", ["abcd"], "ab abc"),
        ("\n  one\x1b[2J", [], "one\ufffd[2J"),
        ("one \n two \n ", [], "one \n two"),
    ],
)
def test_a_stop_text_is_never_shown(text: str, stop: list[str], wanted: str) -> None:
    pieces: list[str] = []
    stream = Stream(_Letters(), {0}, stop, pieces.append)
    stream.put(torch.tensor([[1, 2]]))  # the prompt
    for char in [*text, "\0"]:
        stream.put(torch.tensor([ord(char)]))
    stream.end()
    assert "".join(pieces) == wanted
    assert stream.tokens == len(text)
