"""Tables of a study, in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from benchmarks.measure import table
from experiments.statistics import Mean, by_seed, mean, paired
from experiments.study import Records, Study

SCORES = {
    "test/loss": "test loss",
    "test/accuracy": "accuracy",
    "prose/loss": "loss on prose",
}


def written(rate: float) -> str:
    """A learning rate in two digits at most: 3e-03, 1.5e-02."""
    return f"{rate:.1e}".replace(".0e", "e")


def final_table(study: Study, records: Records) -> str:
    """Per arm: size, best rate, the scores as mean and 95 % interval over the seeds, and what a step costs."""
    arms = [(arm, study.finished(arm, "final", records)) for arm in study.arms]
    shown = [key for key in SCORES if any(key in r["scores"] for _, found in arms for r in found)]
    head = ["method", "trained", "rate", *(SCORES[key] for key in shown), "CPU s/step", "saved MB", "runs"]
    rows: list[list[object]] = []
    for arm, found in arms:
        if not found:
            continue
        first: Any = found[0]
        rate = written(first["spec"]["lr"]) if first["spec"]["steps"] else ""
        scores = [str(mean(list(by_seed(found, key).values()))) for key in shown]
        seconds = mean([r["seconds_per_step"] for r in found if r["seconds_per_step"] is not None])
        rows.append(
            [arm.label, f"{first['trainable']:,}" if rate else "", rate, *scores]
            + [f"{seconds.mean:.3f}" if rate else "", f"{first['saved_bytes'] / 1e6:.1f}" if rate else "", len(found)]
        )
    waiting = ", ".join(arm.label for arm, found in arms if not found)
    missing = f"Not run with these seeds: {waiting}." if waiting else ""
    return "\n\n".join(part for part in (table(head, rows) if rows else "", missing) if part)


def sweep_table(study: Study, records: Records) -> str:
    """Per arm the score that its rates were compared by; the best is bold."""
    tried = {arm.label: study.rates_tried(arm, records)[0] for arm in study.arms if arm.method["name"] != "base"}
    rates = sorted({lr for scores in tried.values() for lr in scores})
    rows = []
    for label, scores in tried.items():
        if not (known := [s for s in scores.values() if s is not None]):
            continue
        cells = []
        for lr in rates:
            score = scores.get(lr)
            text = "" if score is None else "diverged" if score == float("inf") else f"{score:.3f}"
            cells.append(f"**{text}**" if score is not None and score == min(known) < float("inf") else text)
        rows.append([label, *cells])
    return table([f"{study.by} by rate", *map(written, rates)], rows) if rows else ""


def noise_rises(study: Study, records: Records) -> dict[str, dict[float, Mean]]:
    """Rise of the test loss by arm and by size of the noise on the merged weights, over the seeds of the final runs."""
    rises: dict[str, dict[float, Mean]] = {}
    for arm in study.arms:
        found = study.finished(arm, "final", records)
        sizes = sorted({float(k.removeprefix("noise/")) for r in found for k in r["scores"] if k.startswith("noise/")})
        if sizes:
            rises[arm.label] = {
                s: mean([r["scores"][f"noise/{s}"] - r["scores"]["test/loss"] for r in found]) for s in sizes
            }
    return rises


def noise_table(study: Study, records: Records) -> str:
    """`noise_rises` as a table."""
    rises = noise_rises(study, records)
    sizes = sorted({size for found in rises.values() for size in found})
    rows = [[label, *(str(found[size]) if size in found else "" for size in sizes)] for label, found in rises.items()]
    return table(["rise of the test loss under noise", *map(str, sizes)], rows) if rows else ""


def norm_table(study: Study, records: Records) -> str:
    """Per arm the norm of the learned update by kind of layer: medians over the blocks and seeds."""
    found = {arm.label: _norms(study.finished(arm, "final", records)) for arm in study.arms}
    kinds = list(dict.fromkeys(kind for norms in found.values() for kind in norms))
    rows = [[label, *(f"{median(norms[kind]):.2f}" for kind in kinds)] for label, norms in found.items() if norms]
    return table(["norm of the update", *kinds], rows) if rows else ""


def _norms(found: Sequence[Any]) -> dict[str, list[float]]:
    norms: dict[str, list[float]] = {}
    for record in found:
        for name, norm in (record["spectra"] or {}).get("norm", {}).items():
            norms.setdefault(name.rpartition(".")[2], []).append(norm)
    return norms


def difference_table(study: Study, records: Records) -> str:
    """The comparisons that the study names: A - B, paired by seed; bold where the 95 % interval leaves zero out."""
    arms = {arm.label: study.finished(arm, "final", records) for arm in study.arms}
    found = {(a, b): {key: paired(arms[a], arms[b], key) for key in SCORES} for a, b in study.compare}
    found = {pair: scores for pair, scores in found.items() if any(score.n > 1 for score in scores.values())}
    shown = [key for key in SCORES if any(scores[key].n > 1 for scores in found.values())]
    rows = [
        [f"{a} - {b}", *(_difference(scores[key]) for key in shown), max(score.n for score in scores.values())]
        for (a, b), scores in found.items()
    ]
    return table(["difference", *(SCORES[key] for key in shown), "seeds"], rows) if rows else ""


def _difference(score: Mean) -> str:
    if score.n < 2:
        return ""
    text = f"{score.mean:+.3f} ± {score.half:.3f}"
    return f"**{text}**" if abs(score.mean) > score.half else text
