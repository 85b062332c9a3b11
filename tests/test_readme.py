"""The README's Python blocks run as they stand, and its commands parse."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from tests.callbacks.toys import Numbers, Toy

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama: str) -> None:
    monkeypatch.chdir(tmp_path)
    evaluated: list[Any] = []
    names: dict[str, Any] = {
        "any_lightning_module": Toy(),
        "datamodule": Numbers(),
        "model": AutoModelForCausalLM.from_pretrained(tiny_llama),
        "fresh_model": AutoModelForCausalLM.from_pretrained(tiny_llama),
        "evaluate": evaluated.append,
    }
    assert len(BLOCKS) == 3
    # The block trains for Lightning's default of 1,000 epochs; two are enough to see that it runs.
    exec(BLOCKS[0].replace("L.Trainer(", "L.Trainer(max_epochs=2, accelerator='cpu', devices=1, "), names)  # noqa: S102
    assert len(list(tmp_path.glob("lightning_logs/version_0/merged/model.safetensors"))) == 1
    exec(BLOCKS[2], names)  # noqa: S102
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert evaluated == [names["model"]]


def test_the_line_for_fsdp2_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a Trainer nothing is to be told; with one, its callbacks are."""
    model = SimpleNamespace(blocks=["first", "second"])
    sharded: list[Any] = []
    names: dict[str, Any] = {"build": lambda: model, "fully_shard": lambda block, mesh: sharded.append((block, mesh))}
    exec(BLOCKS[1], names)  # noqa: S102
    told: list[Any] = []
    callback = SimpleNamespace(on_model_built=lambda trainer, module, everywhere: told.append((module, len(sharded))))
    trainer = SimpleNamespace(callbacks=[callback])
    module = SimpleNamespace(trainer=trainer, _trainer=trainer, device_mesh={"data_parallel": "mesh"})
    names["configure_model"](module)
    assert told == [(module, 0)]  # before anything was sharded
    assert sharded == [("first", "mesh"), ("second", "mesh")]
    module._trainer = None
    names["configure_model"](module)
    assert len(told) == 1


@pytest.mark.parametrize(
    "line", re.findall(r"^    python -m lightning_pmss (.*)$", README.read_text(encoding="utf-8"), re.MULTILINE)
)
def test_commands_parse(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    from lightning_pmss.cli import TOOLS, main

    subcommand, *options = shlex.split(line)
    shown = [subcommand, "--help"] if subcommand in TOOLS else [subcommand, *options, "--print_config"]
    with pytest.raises(SystemExit) as stop:
        main(shown)
    assert stop.value.code in (0, None)
    text = capsys.readouterr().out
    named = {option.lstrip("-").split(".")[-1] for option in options if option.startswith("--")}
    assert all(name in text for name in named - {"config"})
