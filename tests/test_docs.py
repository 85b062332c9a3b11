"""The documentation's Python blocks run, its commands parse, its links lead somewhere, and the messages it quotes are ours."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM

from tests.callbacks.toys import Numbers, Toy

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
# The blocks of these pages belong together and have tests of their own (quantised.md needs libraries that may be missing).
TESTED_APART = ("export", "functions", "quantised")
BLOCKS = [
    pytest.param(block, id=f"{page.stem}-{number}")
    for page in DOCS
    if page.stem not in TESTED_APART
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))
]


def blocks(page: str) -> list[str]:
    """The Python blocks of one page."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8"), re.DOTALL)


COMMANDS = sorted(
    {
        line
        for page in DOCS
        for line in re.findall(
            r"^    python -m lightning_pmss (.*[^\\\n])$", page.read_text(encoding="utf-8"), re.MULTILINE
        )
    }
)


@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_run(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama: str) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {
        "module": Toy(),
        "datamodule": Numbers(),
        "model": AutoModelForCausalLM.from_pretrained(tiny_llama),
    }
    short = "L.Trainer(max_epochs=2, accelerator='cpu', devices=1, "
    exec(block.replace("L.Trainer(", short), names)  # noqa: S102


def test_the_functions_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama: str) -> None:
    monkeypatch.chdir(tmp_path)
    evaluated: list[Any] = []
    names: dict[str, Any] = {
        "model": AutoModelForCausalLM.from_pretrained(tiny_llama),
        "fresh_model": AutoModelForCausalLM.from_pretrained(tiny_llama),
        "evaluate": evaluated.append,
    }
    (block,) = blocks("functions")
    exec(block, names)  # noqa: S102
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert evaluated == [names["model"]]


def test_the_line_for_fsdp2_runs() -> None:
    """Without a Trainer no callback is called; with one, its callbacks are."""
    model = SimpleNamespace(blocks=["first", "second"])
    sharded: list[Any] = []
    names: dict[str, Any] = {"build": lambda: model, "fully_shard": lambda block, mesh: sharded.append((block, mesh))}
    (block,) = blocks("scaling")
    exec(block, names)  # noqa: S102
    called: list[Any] = []
    callback = SimpleNamespace(on_model_built=lambda trainer, module, everywhere: called.append((module, len(sharded))))
    trainer = SimpleNamespace(callbacks=[callback])
    module = SimpleNamespace(trainer=trainer, _trainer=trainer, device_mesh={"data_parallel": "mesh"})
    names["configure_model"](module)
    assert called == [(module, 0)]  # before anything was sharded
    assert sharded == [("first", "mesh"), ("second", "mesh")]
    module._trainer = None
    names["configure_model"](module)
    assert len(called) == 1


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_are_known_with_their_options(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    from lightning_pmss.cli import TOOLS, main

    subcommand, *options = shlex.split(line, comments=True)
    with pytest.raises(SystemExit) as stop:
        main([subcommand, "--help"] if subcommand in TOOLS else [subcommand, "--help"])
    assert stop.value.code in (0, None)
    text = capsys.readouterr().out
    for option in options:
        # What lies below --model and --data depends on the class, and is not in this help.
        if option.startswith("--") and ("." not in option or option.startswith(("--pmss.", "--trainer."))):
            assert option.split("=")[0] in text


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_page_is_in_the_site() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]

    def pages(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [page for value in (entry.values() if isinstance(entry, dict) else entry) for page in pages(value)]

    assert sorted(pages(nav)) == [page.name for page in DOCS]


def test_quoted_messages_are_in_the_source() -> None:
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "lightning_pmss").rglob("*.py"))
    joined = re.sub(r'"\s*\n\s*f?"', "", source)  # messages that run over several literals
    quoted = re.findall(r"\*\*(.+?)\*\*", (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"))
    assert len(quoted) > 20
    for message in quoted:
        assert re.sub(r"\s+", " ", message) in joined, message


def test_capability_table_is_what_the_probes_find() -> None:
    pytest.importorskip("peft", reason="the table compares with peft")
    from benchmarks.capabilities import METHODS, PROBES, run

    page = (ROOT / "docs" / "capabilities.md").read_text(encoding="utf-8")
    cells = dict(re.findall(r"^\| (.+?) \| (.+) \|$", page, re.MULTILINE))
    for probes in PROBES.values():
        for name, probe in probes.items():
            found = ["yes" if run(probe, method) else "-" for method in METHODS.values()]
            assert cells[name].split(" | ") == found, name
