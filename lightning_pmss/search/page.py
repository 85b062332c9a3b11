"""Write the page of a search as one HTML file."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

import lightning_pmss.search.pictures as pictures
from lightning_pmss.inspect.page import Section, picture_section, render
from lightning_pmss.search.ranks import ranks
from lightning_pmss.search.records import Line, winner
from lightning_pmss.search.space import Choice, Fixed, Space
from lightning_pmss.search.storage import direction
from lightning_pmss.search.table import cells
from lightning_pmss.store.disk import atomic_file

_FEWEST = 8  # trials from which importances are computed


def write_page(
    target: Path, name: str, trials: Sequence[Line], space: Space, bound: Mapping[str, Any], untrained: float | None
) -> Path:
    """Write the page; an earlier one is replaced.

    Args:
        target: File to write.
        name: Of the study.
        trials: Its trials.
        space: Its space.
        bound: What its trials share.
        untrained: Score of the untrained model.

    Returns:
        The file.
    """
    monitor, mode = bound["monitor"], bound["mode"]
    scored = [line for line in trials if line.early is not None]
    sections = []
    if scored:
        sections.append(picture_section("History", partial(pictures.history, trials, monitor, mode, untrained)))
        sections += _early_and_final(trials, bound)
        sections += _parallel(scored, space, bound)
        sections += _importances(scored, space, mode)
    sections.append(Section("Trials", rows=cells(trials, space, mode)))
    sections.append(Section("Search space", text=yaml.safe_dump(dict(space.text), sort_keys=False)))
    sections.append(Section("Recipe", text=yaml.safe_dump(bound["recipe"], sort_keys=False)))
    subtitle = f"stopped at {bound['fraction']:g} of the training; sampler {bound['sampler']}, seed {bound['seed']}"
    page = render(f"PMSS search {name}", subtitle, _figures(trials, monitor, mode, untrained), sections)
    with atomic_file(target) as new:
        new.write_bytes(page.encode())
    return target


def _figures(trials: Sequence[Line], monitor: str, mode: str, untrained: float | None) -> list[tuple[str, str]]:
    best = winner(trials, mode)
    found = [("trials", str(len(trials)))]
    for state in ("diverged", "failed"):
        if number := sum(line.state == state for line in trials):
            found.append((state, str(number)))
    if untrained is not None:
        found.append((f"{monitor}, untrained", f"{untrained:.4g}"))
    if best is not None:
        score = best.final if best.final is not None else best.early
        found.append((f"{monitor}, best (trial {best.number})", f"{score:.4g}"))
    seconds = sum(line.seconds or 0.0 for line in trials)
    found.append(("time of all trials", f"{seconds / 3600:.2f} h"))
    return found


def _early_and_final(trials: Sequence[Line], bound: Mapping[str, Any]) -> list[Section]:
    if bound["fraction"] == 1 or not any(line.final is not None for line in trials):
        return []
    text = ranks(trials, bound["mode"]).text()
    return [picture_section("Early and final scores", partial(pictures.scatter, trials, bound["monitor"]), text)]


def _parallel(scored: Sequence[Line], space: Space, bound: Mapping[str, Any]) -> list[Section]:
    sections = []
    for method in [None] if not space.methods else list(space.methods):
        of_method = [line for line in scored if line.method in (None, method)]
        names = pictures.names_for(of_method, space, method)
        if len(of_method) > 1 and names:
            title = "Parallel coordinates" if method is None else f"Parallel coordinates: {method}"
            draw = partial(pictures.parallel, of_method, names, space, bound["monitor"], bound["mode"])
            sections.append(picture_section(title, draw, "Dark lines are the better trials; the best one is red."))
    return sections


def _importances(scored: Sequence[Line], space: Space, mode: str) -> list[Section]:
    """Of the parameters that all trials have, and of each method's trials apart."""
    sections = []
    for method in [None, *space.methods]:
        of_method = [line for line in scored if method is None or line.method in (None, method)]
        names = pictures.names_for(of_method, space, method)
        if len(of_method) < _FEWEST or len(names) < 2:
            continue
        draw = partial(_draw_importances, of_method, names, space, mode)
        title = "Importances" if method is None else f"Importances: {method}"
        note = "PED-ANOVA: how much of what the best tenth has in common, against all trials, is due to each option."
        sections.append(picture_section(title, draw, note))
    return sections


def _draw_importances(scored: Sequence[Line], names: Sequence[str], space: Space, mode: str) -> str:
    study = optuna.create_study(direction=direction(mode))
    spread = {name: _distribution(space, name) for name in names}
    for line in scored:
        params = {name: line.params[name] for name in names}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=spread, value=line.early))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        values = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())
    return pictures.importances(values)


def _distribution(space: Space, name: str) -> optuna.distributions.BaseDistribution:
    if name == pictures.METHOD:
        return optuna.distributions.CategoricalDistribution(list(space.methods))
    entry = space.entry(name)
    assert not isinstance(entry, Fixed)
    if isinstance(entry, Choice):
        return optuna.distributions.CategoricalDistribution(entry.labels())
    if entry.whole:
        return optuna.distributions.IntDistribution(
            int(entry.low), int(entry.high), log=entry.log, step=int(entry.step or 1)
        )
    return optuna.distributions.FloatDistribution(entry.low, entry.high, log=entry.log, step=entry.step)
