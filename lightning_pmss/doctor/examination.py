"""Run the trials, each with a time limit, and put all findings together."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from lightning_pmss.doctor.installed import NAME, Extra, extras, malicious, versions
from lightning_pmss.doctor.machine import machine
from lightning_pmss.doctor.trials import MISSING, TRIALS
from lightning_pmss.messages import one_line

SECONDS = 600  # DeepSpeed compiles an operation on its first use
_PROGRAM = (sys.executable, "-m", "lightning_pmss.doctor.trials")
Outcome = Literal["works", "broken", "missing", "hangs"]


@dataclass(frozen=True)
class Trial:
    """What a trial found.

    Attributes:
        name: Its name.
        outcome: "works", "broken" (an error), "missing" (something is not installed) or "hangs" (the time limit).
        reason: The last line of the error, or what is missing.
        seconds: How long it took.
        found: Further findings.
    """

    name: str
    outcome: Outcome
    reason: str = ""
    seconds: float = 0.0
    found: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Examination:
    """All findings about this machine and installation."""

    versions: dict[str, str | None]
    malicious: list[str]
    machine: dict[str, Any]
    devices: Trial
    extras: list[Extra]
    trials: list[Trial]

    @property
    def healthy(self) -> bool:
        """Whether nothing that is installed is broken."""
        bad = any(trial.outcome in ("broken", "hangs") for trial in (self.devices, *self.trials))
        return not bad and not self.malicious

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        rows = [{**asdict(extra), "command": extra.command} for extra in self.extras]
        return {**asdict(self), "extras": rows, "healthy": self.healthy}

    def __str__(self) -> str:
        return "\n".join(
            [*_versions(self.versions, self.malicious), *_devices(self.machine, self.devices), *_extras(self.extras)]
            + ["", "tried", *map(line, self.trials), "", self.verdict()]
        )

    def verdict(self) -> str:
        """Summarise in one sentence."""
        wrong = [t.name for t in (self.devices, *self.trials) if t.outcome in ("broken", "hangs")] + self.malicious
        return "Nothing that is installed is broken." if not wrong else f"Not in order: {', '.join(wrong)}."


def examine(
    names: Sequence[str] = tuple(TRIALS), seconds: float = SECONDS, announce: Callable[[str], None] = lambda line: None
) -> Examination:
    """Look at everything and run the trials.

    Args:
        names: Which trials.
        seconds: Time limit of each.
        announce: Gets the name of each trial before it runs.
    """
    found = []
    for name in ("devices", *names):
        announce(name)
        found.append(attempt(name, seconds))
    return Examination(versions(), malicious(), machine(), found[0], extras(), found[1:])


def attempt(name: str, seconds: float = SECONDS, program: Sequence[str] = _PROGRAM) -> Trial:
    """Run one trial in a process of its own; at its time limit it is killed with all that it has started.

    Args:
        name: Name of the trial.
        seconds: The limit.
        program: Program that runs the trial of that name.
    """
    began = time.perf_counter()
    process = subprocess.Popen(  # noqa: S603
        [*program, name],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        return Trial(name, "hangs", f"no result within {seconds:g} s", seconds)
    finally:
        _kill(process)
    took = round(time.perf_counter() - began, 1)
    if process.returncode == 0:
        return Trial(name, "works", "", took, json.loads(out.splitlines()[-1]))
    if process.returncode == MISSING:
        return Trial(name, "missing", json.loads(out.splitlines()[-1])["missing"], took)
    last = next((text for text in reversed(err.splitlines()) if text.strip()), f"exit code {process.returncode}")
    if process.returncode < 0:
        last = f"killed by {signal.Signals(-process.returncode).name}: {last}"
    return Trial(name, "broken", one_line(last), took)


def _kill(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            if hasattr(os, "killpg"):
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
        process.communicate()


def _versions(known: dict[str, str | None], bad: list[str]) -> list[str]:
    rows = [f"  {name:<15}{number}" for name, number in known.items() if number is not None]
    absent = [name for name, number in known.items() if number is None and name != NAME]
    if known[NAME] is None:
        rows.insert(1, f"  {NAME:<15}not installed by pip; it runs from its source")
    rows += [f"  not installed: {', '.join(absent)}"] if absent else []
    return ["versions", *rows, *(f"  {name} was a MALICIOUS release: remove it and change your keys" for name in bad)]


def _devices(here: dict[str, Any], tried: Trial) -> list[str]:
    memory, disk = here["memory"], here["disk"]
    size = "memory unknown" if memory["free"] is None else f"{_gb(memory['free'])} of {_gb(memory['total'])} GB free"
    rows = ["", "devices", f"  CPU            {here['cores']} cores, {size}"]
    if tried.outcome != "works":
        rows.append(f"  torch          {tried.outcome}: {tried.reason}")
    elif not tried.found["accelerators"]:
        rows.append("  accelerators   none that torch can use")
    for entry in tried.found.get("accelerators", ()):
        free = f", {_gb(entry['free'])} of {_gb(entry['total'])} GB free" if "free" in entry else ""
        rows.append(f"  {entry['device']:<15}{entry.get('name', '')}{free}")
    rows.append(f"  disk           {_gb(disk['free'])} of {_gb(disk['total'])} GB free, at {disk['folder']}")
    return [*rows, f"  C++ compiler   {here['compiler'] or 'none'}"]


def _extras(found: list[Extra]) -> list[str]:
    rows = [
        f"  {extra.name:<15}" + (f"lacks {', '.join(extra.missing)}: {extra.command}" if extra.missing else "complete")
        for extra in found
    ]
    return ["", "extras", *(rows or ["  unknown, since the package was not installed by pip"])]


def line(trial: Trial) -> str:
    """Return a trial as one line."""
    what = f"{TRIALS[trial.name][1]:<36}"
    where = f" on {trial.found['device']}" if "device" in trial.found else ""
    return f"  {what}{trial.outcome}{where}{f': {trial.reason}' if trial.reason else ''} ({trial.seconds:.1f} s)"


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f}"
