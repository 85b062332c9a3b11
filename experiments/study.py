"""A study: a YAML file with arms (a method at a size) and their learning rates, turned into runs.

Pure functions of what is asked and what is finished: `Study.next_runs` can be called at any time, on any day, and says what
remains. Each arm first sweeps its learning rates with the seeds of ``sweep``; where the best lies at an end of the rates
tried, half a decade more is tried there, at most ``extend`` times an end. Then the best goes on with the seeds of ``final``.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from experiments.methods import METHODS, TARGETS
from experiments.optimizers import OPTIMIZERS
from experiments.tasks import TASKS

Spec = dict[str, Any]
Records = Mapping[str, Mapping[str, Any]]

RUN_DEFAULTS: Spec = {"dtype": "float32", "precision": "32-true", "evaluate": ["val"]}
SHOW = ("frontier", "gradients", "lead", "noise", "norms", "rates", "spectrum", "sweep")
_PHASE = ("seeds", "evaluate", "steps", "spectra", "task")


def identity(spec: Mapping[str, Any]) -> str:
    """The name of a run: readable words and a digest of everything that it depends on."""
    digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:10]
    method = spec["method"]
    words = [
        spec["task"]["name"],
        method["name"].replace(" ", "-"),
        *([f"r{method['rank']}"] if "rank" in method else []),
    ]
    return "-".join([*words, f"lr{spec['lr']:g}", f"seed{spec['seed']}", digest])


def half_decade(lr: float, steps: int) -> float:
    """The rate ``steps`` half-decades further: 1e-3, 3e-3, 1e-2, ..."""
    k = round(2 * math.log10(lr)) + steps
    return float(f"{10 ** (k / 2):.0e}") if k % 2 == 0 else float(f"3e{(k - 1) // 2}")


@dataclass(frozen=True)
class Arm:
    """One method at one size: a line of a table."""

    label: str
    method: Mapping[str, Any]
    rates: tuple[float, ...]
    overrides: Mapping[str, Any]


@dataclass(frozen=True)
class Study:
    """What a YAML file asks for; see `experiments/README.md` for its keys."""

    name: str
    asks: str
    budget_minutes: float
    common: Mapping[str, Any]
    arms: tuple[Arm, ...]
    sweep: Mapping[str, Any]
    final: Mapping[str, Any] | None
    extend: int
    by: str
    compare: tuple[tuple[str, str], ...]
    show: tuple[str, ...]

    def spec(self, arm: Arm, phase: Mapping[str, Any], lr: float, seed: int) -> Spec:
        """Everything that a run depends on."""
        options = {key: value for key, value in phase.items() if key != "seeds"}
        found: Spec = {**RUN_DEFAULTS, **self.common, **options, **arm.overrides}
        found["task"] = {**self.common["task"], **options.get("task", {}), **arm.overrides.get("task", {})}
        return found | {"method": dict(arm.method), "lr": lr, "seed": seed}

    def rates_tried(self, arm: Arm, records: Records) -> tuple[dict[float, float | None], list[float]]:
        """Mean score by rate (None: not finished), and the rates that are missing next."""
        rates = sorted(arm.rates)
        added = {-1: 0, 1: 0}
        while True:
            scores = {lr: self._mean(arm, self.sweep, lr, records) for lr in rates}
            missing = [lr for lr, score in scores.items() if score is None]
            if missing:
                return scores, missing
            best = min(scores, key=lambda lr: scores[lr])  # type: ignore[arg-type, return-value]
            if scores[best] == math.inf:
                return scores, []
            end = {rates[0]: -1, rates[-1]: 1}.get(best)
            if end is None or len(arm.rates) == 1 or added[end] >= self.extend:  # one rate is no sweep
                return scores, []
            added[end] += 1
            rates = sorted([*rates, half_decade(best, end)])

    def best_rate(self, arm: Arm, records: Records) -> float | None:
        """The rate that goes on; None while the sweep is not finished, or if all of it diverged."""
        scores, missing = self.rates_tried(arm, records)
        known = {lr: score for lr, score in scores.items() if score is not None and score < math.inf}
        return None if missing or not known else min(known, key=lambda lr: known[lr])

    def next_runs(self, records: Records) -> list[Spec]:
        """The runs that can begin now, sweeps before finals."""
        sweeps, finals = [], []
        for arm in self.arms:
            _, missing = self.rates_tried(arm, records)
            sweeps += [self.spec(arm, self.sweep, lr, seed) for lr in missing for seed in self.sweep["seeds"]]
            best = self.best_rate(arm, records)
            if best is not None and self.final is not None:
                finals += [self.spec(arm, self.final, best, seed) for seed in self.final["seeds"]]
        return [spec for spec in (*sweeps, *finals) if identity(spec) not in records]

    def _mean(self, arm: Arm, phase: Mapping[str, Any], lr: float, records: Records) -> float | None:
        found = [records.get(identity(self.spec(arm, phase, lr, seed))) for seed in phase["seeds"]]
        if any(record is None for record in found):
            return None
        values = [record["scores"].get(self.by, math.inf) for record in found]  # type: ignore[index]
        return sum(v if math.isfinite(v) else math.inf for v in values) / len(values)

    def finished(self, arm: Arm, phase: str, records: Records) -> list[Mapping[str, Any]]:
        """The records of an arm in a phase: all rates of ``"sweep"``, the seeds of the best one of ``"final"``."""
        if phase == "sweep":
            rates: Iterable[float] = self.rates_tried(arm, records)[0]
            options: Mapping[str, Any] | None = self.sweep
        else:
            best = self.best_rate(arm, records)
            rates, options = ([] if best is None else [best]), self.final
        if options is None:
            return []
        ids = [identity(self.spec(arm, options, lr, seed)) for lr in rates for seed in options["seeds"]]
        return [records[i] for i in ids if i in records]


def read_study(path: Path) -> Study:
    """Read and check a study.

    Raises:
        ValueError: A key is missing or not known; the message names it.
    """
    told = yaml.safe_load(path.read_text(encoding="utf-8"))
    unknown = set(told) - {
        "asks",
        "budget_minutes",
        "common",
        "arms",
        "sweep",
        "final",
        "extend",
        "by",
        "compare",
        "show",
    }
    missing = {"asks", "budget_minutes", "common", "arms", "sweep"} - set(told)
    if unknown or missing:
        raise ValueError(f"{path.name}: unknown keys {sorted(unknown)}, missing keys {sorted(missing)}.")
    arms = [arm for entry in told["arms"] for arm in _arms(entry, path.name)]
    labels = [arm.label for arm in arms]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise ValueError(f"{path.name}: the label {twice[0]!r} stands for two arms.")
    compare = tuple((str(a), str(b)) for a, b in told.get("compare", ()))
    if lost := sorted({label for both in compare for label in both} - set(labels)):
        raise ValueError(f"{path.name}: compare names {lost[0]!r}, which is no arm; there are {labels}.")
    if (task := told["common"].get("task", {}).get("name")) not in TASKS:
        raise ValueError(f"{path.name}: common.task.name is {task!r}; choose one of {list(TASKS)}.")
    for options in (told["common"], *(arm.overrides for arm in arms)):
        if (optimizer := options.get("optimizer", "adamw")) not in OPTIMIZERS:
            raise ValueError(f"{path.name}: optimizer is {optimizer!r}; choose one of {list(OPTIMIZERS)}.")
        if "flat" in options and not (isinstance(options["flat"], (int, float)) and options["flat"] > 0):
            raise ValueError(
                f"{path.name}: flat is {options['flat']!r}; give FlatLoRA's sigma, such as 0.05, or leave it out."
            )
    if lost := sorted(set(told.get("show", ())) - set(SHOW)):
        raise ValueError(f"{path.name}: show names {lost[0]!r}; choose of {list(SHOW)}.")
    for phase in ("sweep", "final"):
        if extra := set(told.get(phase) or {}) - set(_PHASE):
            raise ValueError(f"{path.name}: {phase} has the unknown keys {sorted(extra)}; known are {list(_PHASE)}.")
    return Study(
        name=path.stem,
        asks=told["asks"],
        budget_minutes=float(told["budget_minutes"]),
        common=told["common"],
        arms=tuple(arms),
        sweep={"seeds": [0]} | told["sweep"],
        final=told.get("final"),
        extend=int(told.get("extend", 2)),
        by=told.get("by", "val/loss"),
        compare=compare,
        show=tuple(told.get("show", ())),
    )


def _arms(entry: Mapping[str, Any], where: str) -> Iterable[Arm]:
    """One arm, or one for each combination of the lists under ``grid``."""
    given = dict(entry)
    label, rates, grid = given.pop("label", None), given.pop("lr", None), given.pop("grid", {})
    overrides = given.pop("run", {})
    if given.get("name") not in METHODS:
        raise ValueError(f"{where}: the method {given.get('name')!r} is not known; choose one of {list(METHODS)}.")
    if given.get("targets", "all") not in TARGETS:
        raise ValueError(f"{where}: targets={given['targets']!r}; choose one of {list(TARGETS)}.")
    if not rates:
        raise ValueError(f"{where}: the arm {label or given} has no learning rates; add `lr: [...]`.")
    for values in itertools.product(*grid.values()):
        chosen = dict(zip(grid, values, strict=True))
        method = {**given, **chosen}
        words = [str(method["name"]), *(str(v) for k, v in method.items() if k != "name" and not isinstance(v, dict))]
        named = label.format(**method) if label else " ".join(words)
        yield Arm(named, method, tuple(float(lr) for lr in rates), overrides)
