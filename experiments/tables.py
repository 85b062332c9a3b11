"""Tables of a study, in Markdown."""

from __future__ import annotations

from typing import Any

from benchmarks.measure import table
from experiments.statistics import by_seed, mean, paired
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
            rows.append([arm.label, "", "", *([""] * (len(shown) + 2)), "0"])
            continue
        first: Any = found[0]
        rate = written(first["spec"]["lr"]) if first["spec"]["steps"] else ""
        scores = [str(mean(list(by_seed(found, key).values()))) for key in shown]
        seconds = mean([r["seconds_per_step"] for r in found if r["seconds_per_step"] is not None])
        rows.append(
            [arm.label, f"{first['trainable']:,}" if rate else "", rate, *scores]
            + [f"{seconds.mean:.3f}" if rate else "", f"{first['saved_bytes'] / 1e6:.1f}" if rate else "", len(found)]
        )
    return table(head, rows)


def sweep_table(study: Study, records: Records) -> str:
    """Per arm the score that its rates were compared by; the best is bold."""
    tried = {arm.label: study.rates_tried(arm, records)[0] for arm in study.arms if arm.method["name"] != "base"}
    rates = sorted({lr for scores in tried.values() for lr in scores})
    rows = []
    for label, scores in tried.items():
        known = [s for s in scores.values() if s is not None]
        cells = []
        for lr in rates:
            score = scores.get(lr)
            text = "" if score is None else "diverged" if score == float("inf") else f"{score:.3f}"
            cells.append(f"**{text}**" if score is not None and score == min(known) < float("inf") else text)
        rows.append([label, *cells])
    return table([f"{study.by} by rate", *map(written, rates)], rows)


def difference_table(study: Study, records: Records) -> str:
    """The comparisons that the study names: mean of A - B, paired by seed, with its 95 % interval."""
    arms = {arm.label: study.finished(arm, "final", records) for arm in study.arms}
    rows = []
    for a, b in study.compare:
        for key, what in SCORES.items():
            difference = paired(arms[a], arms[b], key)
            if difference.n > 1:
                sure = "no" if abs(difference.mean) <= difference.half else "yes"
                rows.append([f"{a} - {b}", what, f"{difference.mean:+.3f} ± {difference.half:.3f}", difference.n, sure])
    return table(["difference", "in", "mean and 95 % interval", "seeds", "beyond noise"], rows) if rows else ""
