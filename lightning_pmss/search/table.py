"""The table of a study for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_pmss.messages import short
from lightning_pmss.search.records import Line, best_first, settings_text
from lightning_pmss.search.space import Space

HEAD = ("trial", "state", "early", "final", "seconds", "settings")


def cells(trials: Sequence[Line], space: Space, mode: str) -> list[tuple[str, ...]]:
    """Return the cells of a study's table with its head: best trials first, by the final score where there is one."""
    final = best_first(trials, mode, final=True)
    ordered = [*final, *(line for line in best_first(trials, mode) if line not in final)]
    ordered += [line for line in trials if line not in ordered]
    rows: list[tuple[str, ...]] = [HEAD]
    for line in ordered:
        state = line.state
        if line.final_state not in ("", line.state):
            state += f", then {line.final_state}"
        seconds = "" if line.seconds is None else f"{line.seconds:.0f}"
        text = settings_text(space, line.params)
        if line.message:
            text += f" ({short(line.message, 100)})"
        rows.append((str(line.number), state, _score(line.early), _score(line.final), seconds, text))
    return rows


def table(trials: Sequence[Line], space: Space, mode: str) -> str:
    """Return the table as text."""
    rows = cells(trials, space, mode)
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD) - 1)]
    texts = []
    for row in rows:
        left = "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=False))
        texts.append(f"{left}  {row[-1]}".rstrip())
    return "\n".join(texts)


def _score(score: float | None) -> str:
    return "" if score is None else f"{score:.6g}"
