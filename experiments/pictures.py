"""Pictures of a study, PNG."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from experiments.statistics import by_seed, mean
from experiments.study import Arm, Records, Study
from experiments.tables import SCORES, noise_rises

matplotlib.use("Agg")


def _family(arm: Arm) -> str:
    """What a line joins: the arms of a method that differ in size (or in what the study calls its x) only."""
    rank = str(arm.method.get("rank", ""))
    return " ".join(word for word in arm.label.split() if word not in (rank, f"r{rank}"))


def _save(figure: Any, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return path


def frontier(study: Study, records: Records, path: Path) -> Path:
    """Each score against trained parameters, with 95 % intervals over the seeds."""
    families: dict[str, list[tuple[Arm, list[Any]]]] = {}
    for arm in study.arms:
        if (found := study.finished(arm, "final", records)) and arm.method["name"] != "base":
            families.setdefault(_family(arm), []).append((arm, list(found)))
    keys = [k for k in SCORES if any(k in r["scores"] for pairs in families.values() for _, f in pairs for r in f)]
    figure, axes = pyplot.subplots(1, max(1, len(keys)), figsize=(5.2 * max(1, len(keys)), 4), squeeze=False)
    for axis, key in zip(axes[0], keys, strict=False):
        for family, pairs in families.items():
            points = sorted((f[0]["trainable"], mean(list(by_seed(f, key).values()))) for _, f in pairs)
            x, y, half = ([p[0] for p in points], [p[1].mean for p in points], [p[1].half for p in points])
            axis.errorbar(x, y, [0 if math.isnan(h) else h for h in half], fmt="o-", capsize=3, label=family, ms=4)
        low, high = axis.get_ylim()
        for arm in study.arms:
            if arm.method["name"] == "base" and (found := study.finished(arm, "final", records)):
                level = mean(list(by_seed(found, key).values())).mean
                if low - 0.5 * (high - low) < level < high + 0.5 * (high - low):  # else it would flatten all the rest
                    axis.axhline(level, color="grey", ls=":", label="before")
        axis.set(xscale="log", xlabel="trained parameters", ylabel=SCORES[key])
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(EngFormatter(sep=" "))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3)
        if families:
            axis.legend(fontsize=7)
    return _save(figure, path)


def rates(study: Study, records: Records, path: Path) -> Path:
    """Score by learning rate, a line an arm."""
    figure, axis = pyplot.subplots(figsize=(7, 4.2))
    styles: dict[str, Any] = {}
    for arm in study.arms:
        if arm.method["name"] == "base":
            continue
        tried = study.rates_tried(arm, records)[0]
        known = {lr: score for lr, score in tried.items() if score is not None and math.isfinite(score)}
        style = styles.setdefault(_family(arm), ["o-", "s--", "^:", "v-.", "x-", "d--", "*-", "+-"][len(styles) % 8])
        axis.plot(list(known), list(known.values()), style, label=arm.label, ms=4)
    axis.set(xscale="log", xlabel="learning rate", ylabel=study.by)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=6, ncol=2)
    return _save(figure, path)


def spectrum(study: Study, records: Records, path: Path) -> Path:
    """Singular values of what was learned over the largest, the median over the layers; first seed, arms of one size."""
    figure, axis = pyplot.subplots(figsize=(7, 4.2))
    families: dict[str, int] = {}
    styles = ("-", "--", ":", "-.", (0, (5, 1)))
    for arm in study.arms:
        found = study.finished(arm, "final", records)
        if not found or not found[0].get("spectra"):
            continue
        median = found[0]["spectra"]["median"]
        family = _family(arm)
        families[family] = families.get(family, -1) + 1  # a colour a method, a dash a size
        look: dict[str, Any] = {
            "color": f"C{list(families).index(family)}",
            "linestyle": styles[families[family] % len(styles)],
        }
        axis.plot(range(1, len(median) + 1), [max(x, 1e-6) for x in median], label=arm.label, **look)
    axis.set(yscale="log", xlabel="number of the singular value", ylabel="over the largest", ylim=(1e-4, 1.2))
    axis.grid(alpha=0.3)
    if families:
        axis.legend(fontsize=7, loc="upper right")
    return _save(figure, path)


def lead(study: Study, records: Records, path: Path) -> Path:
    """Training loss of A less that of B, step by step on the same batches: moving mean over the seeds, and their range."""
    figure, axis = pyplot.subplots(figsize=(7, 4.2))
    arms = {arm.label: study.finished(arm, "final", records) for arm in study.arms}
    for a, b in study.compare:
        left, right = ({r["spec"]["seed"]: r["train_loss"] for r in arms[label]} for label in (a, b))
        curves = [smoothed_difference(left[seed], right[seed]) for seed in sorted(left.keys() & right.keys())]
        if curves:
            steps = [first for first, _ in curves[0]]
            values = list(zip(*[[value for _, value in curve] for curve in curves], strict=True))
            (line,) = axis.plot(steps, [sum(v) / len(v) for v in values], label=f"{a} - {b}")
            axis.fill_between(steps, list(map(min, values)), list(map(max, values)), color=line.get_color(), alpha=0.2)
    axis.axhline(0, color="grey", ls=":")
    axis.set(xlabel="step", ylabel="difference in training loss")
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[1]:
        axis.legend(fontsize=7)
    return _save(figure, path)


def smoothed_difference(a: Sequence[float], b: Sequence[float]) -> list[tuple[float, float]]:
    """``(step, mean of a - b)`` over windows of a tenth of the steps, at least five; the step is the window's middle."""
    width = min(max(5, len(a) // 10), len(a))
    differences = [x - y for x, y in zip(a, b, strict=True)]
    return [
        (start + (width + 1) / 2, sum(differences[start : start + width]) / width)
        for start in range(len(differences) - width + 1)
    ]


def gradients(study: Study, records: Records, path: Path) -> Path:
    """Norm of the whole gradient before clipping, step by step, of each arm's best run of the sweep."""
    figure, axis = pyplot.subplots(figsize=(7, 4.2))
    for arm in study.arms:
        best = study.best_rate(arm, records)
        for record in study.finished(arm, "sweep", records):
            if record["spec"]["lr"] == best and (norms := record.get("gradient_norms")):
                axis.plot(range(1, len(norms) + 1), norms, label=arm.label, lw=1)
                break
    axis.axhline(1.0, color="grey", ls=":", label="the usual clipping")
    axis.set(yscale="log", xlabel="step", ylabel="norm of the gradient")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    return _save(figure, path)


def noise(study: Study, records: Records, path: Path) -> Path:
    """Rise of the test loss under noise on the merged weights, by the size of the noise; means over the seeds."""
    figure, axis = pyplot.subplots(figsize=(7, 4.2))
    for number, (label, rises) in enumerate(noise_rises(study, records).items()):
        half = [0 if math.isnan(rise.half) else rise.half for rise in rises.values()]
        style = ["o-", "s--", "^:", "d-."][number % 4]
        means = [rise.mean for rise in rises.values()]
        axis.errorbar(list(rises), means, half, fmt=style, capsize=3, label=label, ms=4, lw=1)
    axis.set(xscale="log", yscale="log", xlabel="noise, relative to W'", ylabel="rise of the test loss")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    return _save(figure, path)


PICTURES: Mapping[str, Callable[[Study, Records, Path], Path]] = {
    "frontier": frontier,
    "gradients": gradients,
    "lead": lead,
    "noise": noise,
    "rates": rates,
    "spectrum": spectrum,
}
