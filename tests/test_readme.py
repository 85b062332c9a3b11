"""The README's Python block runs as it stands, its commands parse, and its links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.callbacks.toys import Numbers, Toy

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_the_callback_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = BLOCKS
    # The block trains for Lightning's default of 1,000 epochs; two are enough to see that it runs.
    block = block.replace("L.Trainer(", "L.Trainer(max_epochs=2, accelerator='cpu', devices=1, ")
    exec(block, {"any_lightning_module": Toy(), "datamodule": Numbers()})  # noqa: S102
    assert len(list(tmp_path.glob("lightning_logs/version_0/merged/model.safetensors"))) == 1


def test_it_stays_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#\s]+)", README.read_text(encoding="utf-8")))
def test_links_lead_somewhere(target: str) -> None:
    assert target.startswith("http") or (README.parent / target).exists()


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
