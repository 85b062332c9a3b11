"""Options of tools that are fields of a config: help, defaults and choices are the config's own."""

from __future__ import annotations

import json
import re
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

import docstring_parser
import pytest

from lightning_pmss import METHODS, AdapterConfig, PMSSConfig
from lightning_pmss.chat.options import AnswerOptions, FileOptions, ModelOptions
from lightning_pmss.cli import chat as chat_options
from lightning_pmss.cli import main
from lightning_pmss.cli.estimate import CONVERSION, RUN, ZERO
from lightning_pmss.cli.options import Options
from lightning_pmss.estimate import Run
from lightning_pmss.methods.choices import choices_of
from lightning_pmss.methods.documentation import option_texts
from tests.estimate.small import write_config

OF_TOOLS = [
    ("select", Options(PMSSConfig, PMSSConfig.skeleton_options())),
    *(("estimate", part) for part in (RUN, CONVERSION, ZERO)),
    *(("chat", part) for part in (chat_options.MODEL, chat_options.ANSWER)),
    *(("generate", part) for part in (chat_options.MODEL, chat_options.FILE, chat_options.ANSWER)),
]
OF_CHAT = (ModelOptions, AnswerOptions, FileOptions)
SHOWN = {"None": "", "True": "yes", "False": "no", "()": "none"}


def read_by_a_library(owner: type) -> dict[str, str]:
    """The texts of a docstring as another parser reads them."""
    doc = docstring_parser.parse(owner.__doc__ or "", docstring_parser.DocstringStyle.GOOGLE)
    return {part.arg_name: " ".join((part.description or "").replace("`", "").split()) for part in doc.params}


def test_each_option_of_a_tool_has_the_configs_text_default_and_choices(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    for tool, options in OF_TOOLS:
        with pytest.raises(SystemExit):
            main([tool, "--help"])
        page = " ".join(capsys.readouterr().out.partition("options:")[2].split())
        texts, choices = read_by_a_library(options.owner), choices_of(options.owner)
        known = {option.name: option for option in fields(options.owner)}
        for name in options.names:
            default = known[name].default if known[name].default_factory is MISSING else ()
            shown = "" if default is MISSING else SHOWN.get(str(default), str(default))
            flag = f"--{name.replace('_', '-')}"
            text = f"{texts[name]} (default: {shown})" if shown else texts[name]
            assert text in page, name
            before = page.partition(text)[0]
            assert re.findall(r"--(?!no-)[\w-]+", before)[-1] == flag
            if name in choices:
                allowed = ",".join(value for value in choices[name] if value is not None)
                assert before.endswith(f"{flag} {{{allowed}}} "), name


@pytest.mark.parametrize("owner", [AdapterConfig, *(m.config_class for m in METHODS.values()), Run, *OF_CHAT])
def test_every_option_is_described(owner: Any) -> None:
    texts = option_texts(owner)
    assert texts == read_by_a_library(owner)
    assert set(texts) == {option.name for option in fields(owner)}
    assert all(len(text) > 10 for text in texts.values())


@pytest.mark.parametrize("name", choices_of(PMSSConfig))
def test_a_config_takes_its_choices_and_no_other_value(name: str) -> None:
    choices = choices_of(PMSSConfig)[name]
    for value in choices:
        assert getattr(PMSSConfig(**{name: value}), name) == value
    with pytest.raises(ValueError, match=f"{name}='other' is not known; choose one of ") as refused:
        PMSSConfig(**{name: "other"})
    assert str(list(choices)) in str(refused.value)


def test_what_is_not_typed_is_the_default_of_run_and_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_config(tmp_path)
    main(["estimate", "--model", folder, "--json"])
    said = json.loads(capsys.readouterr().out)["run"]
    run = Run(folder)
    assert said == json.loads(json.dumps(asdict(run) | {"config": PMSSConfig().to_dict(), "world": 1}))
    assert said["strategy"] == "single"


def test_what_is_typed_reaches_run_and_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--devices 2 --quantisation nf4 --micro-batch 3 --precision bf16-mixed --weights-dtype float32 --bucket 7"
    words += " --gradient-checkpointing --optimizer sgd --rank 8 --rank-pattern v_proj=4 o_proj=2 --memory keep"
    words += " --coordinates raw --exclude-modules k_proj down_proj --target-modules .*_proj --sequence-length 32"
    main(["estimate", "--model", write_config(tmp_path), "--json", *words.split()])
    said = json.loads(capsys.readouterr().out)["run"]
    conversion = said.pop("config")
    assert said.pop("zero")["bucket"] == 7
    assert said.pop("model") == write_config(tmp_path)
    assert said == {
        "strategy": "ddp",
        "devices": 2,
        "nodes": 1,
        "micro_batch": 3,
        "sequence_length": 32,
        "precision": "bf16-mixed",
        "weights_dtype": "float32",
        "gradient_checkpointing": True,
        "optimizer": "sgd",
        "quantisation": "nf4",
        "world": 2,
    }
    typed = {
        "target_modules": ".*_proj",
        "exclude_modules": ["k_proj", "down_proj"],
        "rank": 8,
        "rank_pattern": {"v_proj": 4, "o_proj": 2},
        "coordinates": "raw",
        "memory": "keep",
    }
    assert conversion == PMSSConfig().to_dict() | typed
