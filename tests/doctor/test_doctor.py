"""``doctor``: what it finds, and what it says of things that are broken, missing or hang."""

from __future__ import annotations

import json
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_pmss.cli import main
from lightning_pmss.doctor import examination, installed, machine, trials
from lightning_pmss.doctor.examination import Trial, attempt
from tests.processes import await_end

REQUIRES = [
    "torch>=2.6",
    'matplotlib>=3.8; extra == "plots"',
    'notthere>=1; extra == "far"',
    'lightning-pmss[plots]; extra == "both"',
    'lightning-pmss[far]; extra == "both"',
    'pytest>=1; extra == "both"',
    'old>=2; sys_platform != "none" and extra == "far"',
]
KNOWN = {"torch": "2.7", "matplotlib": "3.9", "pytest": "8", "old": "1.5", "lightning": "2.6.3"}


def program(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_extras_and_the_commands_that_install_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name not in KNOWN:
            raise PackageNotFoundError(name)
        return KNOWN[name]

    monkeypatch.setattr(installed, "version", version)
    monkeypatch.setattr(installed, "requires", lambda name: REQUIRES)
    found = {extra.name: extra for extra in installed.extras()}
    assert list(found) == ["both", "far", "plots"]
    assert found["plots"].missing == ()
    assert found["far"].missing == found["both"].missing == ("notthere>=1", "old>=2")
    assert found["far"].command == "pip install -c constraints.txt -e '.[far]'"
    assert installed.malicious() == ["lightning 2.6.3"]
    assert installed.versions()["peft"] is None

    monkeypatch.setattr(installed, "requires", lambda name: version("lightning-pmss"))
    assert installed.extras() == []


def test_this_package_s_extras_are_those_of_its_project_file() -> None:
    assert {extra.name for extra in installed.extras()} >= {"deepspeed", "plots", "quantised", "test", "docs"}


@pytest.mark.parametrize(
    ("code", "outcome", "reason"),
    [
        ("print(); print('{\"a\": 1}')", "works", ""),
        ("raise RuntimeError('no such thing')", "broken", "RuntimeError: no such thing"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "broken", "killed by SIGSEGV: exit code -11"),
        (f'print(\'{{"missing": "a compiler"}}\'); raise SystemExit({trials.MISSING})', "missing", "a compiler"),
    ],
)
def test_outcomes(code: str, outcome: str, reason: str) -> None:
    found = attempt("bf16", 60, program(code))
    assert (found.outcome, found.reason) == (outcome, reason)


def test_a_trial_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100)'])\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(child.pid))\n"
        "time.sleep(100)"
    )
    found = attempt("bf16", 2, program(code))
    assert (found.outcome, found.reason) == ("hangs", "no result within 2 s")
    await_end(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize("name", ["bf16", "compile", "bitsandbytes"])
def test_trials_tell_right_from_wrong(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = trials.main(name)
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    if code == trials.MISSING:
        pytest.skip(said["missing"])
    assert code == 0
    if name == "compile":
        monkeypatch.setattr(torch, "compile", lambda layer: lambda rows: layer(rows) * 1.01)
    elif name == "bf16":
        monkeypatch.setattr(torch.nn.functional, "linear", lambda x, w: (x @ w.T) * (1 + (x.dtype == torch.bfloat16)))
    else:
        import bitsandbytes

        monkeypatch.setattr(bitsandbytes.nn, "Linear4bit", lambda *a, compute_dtype, quant_type, **b: Doubled(*a, **b))
    with pytest.raises((ArithmeticError, AssertionError)):
        trials.main(name)


class Doubled(torch.nn.Linear):
    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(rows)


def test_a_compiler_and_a_library_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(trials.NotThereError, match=r"torch\.compile needs a C\+\+ compiler.*apt-get install g\+\+"):
        trials.compile()
    monkeypatch.setattr(installed, "installed", lambda name: None)
    with pytest.raises(trials.NotThereError, match=r"deepspeed is not installed: pip install -c constraints\.txt"):
        trials.deepspeed()


@pytest.mark.distributed
def test_deepspeed_takes_a_step() -> None:
    pytest.importorskip("deepspeed", reason="the trial needs deepspeed")
    found = attempt("deepspeed", 280)
    assert (found.outcome, found.reason) == ("works", "")


@pytest.mark.parametrize("outcome", ["works", "missing", "broken", "hangs"])
def test_the_program_fails_only_for_what_is_broken(
    outcome: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def pretend(name: str, seconds: float) -> Trial:
        if name == "devices":
            entry = {"device": "cuda:0", "name": "A card", "free": 70_000_000_000, "total": 80_000_000_000}
            return Trial(name, "works", found={"accelerators": [entry], "threads": 1})
        return Trial(name, outcome if name == "compile" else "works", "why" if outcome != "works" else "")

    monkeypatch.setattr(examination, "attempt", pretend)
    healthy = outcome in ("works", "missing")
    for options in ((), ("--json",)):
        if healthy:
            main(["doctor", *options])
        else:
            with pytest.raises(SystemExit) as stop:
                main(["doctor", *options])
            assert stop.value.code == 1
        said = capsys.readouterr().out
        if options:
            assert json.loads(said)["healthy"] is healthy
            assert json.loads(said)["versions"]["torch"] == torch.__version__
            continue
        assert "cuda:0         A card, 70.0 of 80.0 GB free" in said
        assert f"torch.compile                       {outcome}" in said
        assert said.splitlines()[-1] == (
            "Nothing that is installed is broken." if healthy else "Not in order: compile."
        )


def test_memory_within_the_limit_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in (
        ("meminfo", "MemTotal: 1000 kB\nMemAvailable: 800 kB\n"),
        ("max", "300000"),
        ("used", "100000"),
    ):
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(machine, "_MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(machine, "_LIMIT", tmp_path / "none")
    assert machine.machine()["memory"] == {"total": 1_024_000, "free": 819_200}
    monkeypatch.setattr(machine, "_LIMIT", tmp_path / "max")
    monkeypatch.setattr(machine, "_USED", tmp_path / "used")
    assert machine.machine()["memory"] == {"total": 300_000, "free": 200_000}
    monkeypatch.setattr(machine, "_MEMORY", tmp_path / "none")
    assert machine.machine()["memory"] == {"total": None, "free": None}


def test_a_time_limit_of_nothing_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "--seconds", "0"])
    assert stop.value.code == 2
    assert "give a number above 0" in capsys.readouterr().err
