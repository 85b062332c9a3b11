"""Whether early scores tell final ones: rank correlations, and how many of the best stay among the best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from scipy.stats import kendalltau, spearmanr

from lightning_pmss.search.records import Line, best_first, diverged_late

TOP = 5
"""How many of the best are compared, as in the paper (arXiv 2407.13906): 4 of its 5 best stayed."""


@dataclass(frozen=True)
class Ranks:
    """Early scores against final ones, over the trials that have both.

    Attributes:
        finished: How many trials have both scores.
        scored: How many have an early one.
        spearman: Rank correlation by Spearman; None for fewer than three trials or equal scores.
        kendall: Rank correlation by Kendall, tau-b; None likewise.
        top: How many of the best are compared; 0 if too few trials have a final score.
        stayed: How many of the ``top`` best early trials are among the ``top`` best at the end.
    """

    finished: int
    scored: int
    spearman: float | None
    kendall: float | None
    top: int
    stayed: int

    def text(self) -> str:
        """Return what can be said, in sentences."""
        if self.finished < 3:
            have = "1 trial has" if self.finished == 1 else f"{self.finished} trials have"
            return f"Early and final scores: {have} both, too few for a rank correlation."
        parts = []
        if self.spearman is None or self.kendall is None:
            parts.append(f"Early and final scores of {self.finished} trials: equal scores allow no rank correlation.")
        else:
            parts.append(
                f"Early and final scores of {self.finished} trials: rank correlation {self.spearman:.2f} (Spearman),"
                f" {self.kendall:.2f} (Kendall)."
            )
        if self.top:
            parts.append(
                f"{self.stayed} of the {self.top} best early trials are among the {self.top} best at the end"
                f" (by chance: {self.top**2 / self.finished:.1f})."
            )
        if self.finished < self.scored:
            parts.append(
                f"Only the best {self.finished} of {self.scored} trials were trained to their end: the figures say how these"
                f" few are ordered, not whether one of the others would have overtaken them. --finish {self.scored} shows it."
            )
        elif not self.top:
            parts.append(f"More than {TOP} finished trials would show how many of the best {TOP} stay.")
        return " ".join(parts)


def ranks(trials: Sequence[Line], mode: str, top: int = TOP) -> Ranks:
    """Compare early and final scores; a trial that diverged after its fraction is the last at the end.

    Args:
        trials: The trials of a study.
        mode: ``min`` or ``max``.
        top: How many of the best are compared.
    """
    worst = math.inf if mode == "min" else -math.inf
    trials = [replace(line, final=worst) if diverged_late(line) else line for line in trials]
    both = [line for line in trials if line.early is not None and line.final is not None]
    early, final = [line.early for line in both], [line.final for line in both]
    varies = len(both) >= 3 and len(set(early)) > 1 and len(set(final)) > 1
    spearman = float(spearmanr(early, final).statistic) if varies else None
    kendall = float(kendalltau(early, final).statistic) if varies else None
    top = top if len(both) > top else 0
    first = {line.number for line in best_first(both, mode)[:top]}
    last = {line.number for line in best_first(both, mode, final=True)[:top]}
    scored = sum(line.early is not None for line in trials)
    return Ranks(len(both), scored, spearman, kendall, top, len(first & last))
