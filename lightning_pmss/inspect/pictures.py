"""Draw pictures as SVG text for a page."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from lightning_pmss.inspect.run import Curve
from lightning_pmss.messages import one_line

MOST_LINES = 12  # more lines would overlap
_INK, _PALE = "#1f4e79", "#9dbbd6"
_MOST_POINTS, _MOST_KINDS, _MOST_LETTERS = 2000, 60, 60


def new_figure(width: float = 7.2, height: float = 3.2) -> Any:
    """Make an empty figure of matplotlib; sizes in inches."""
    # Not by pyplot, which has global state and may need a display.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def svg_text(figure: Any) -> str:
    """Return a figure as an SVG element."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def safe_label(name: str) -> str:
    """Escape and shorten a name for matplotlib: ``$`` would begin a formula, a leading ``_`` hide it from the legend."""
    text = one_line(name)
    text = text if len(text) <= _MOST_LETTERS else f"{text[: _MOST_LETTERS - 3]}..."
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def _thinned(points: Curve) -> Curve:
    """Thin points out to as many as a picture can show, and keep the last one."""
    every = -(-len(points) // _MOST_POINTS)
    return points[::-1][::every][::-1]


def curves(lines: Mapping[str, Curve], *, ylabel: str, smoothing: int = 1, from_zero: bool = False) -> str:
    """Draw values against the step, one line per name; long lines are pale, with a running mean over them.

    Args:
        lines: Name -> points; the first `MOST_LINES` are drawn.
        ylabel: Label of the y axis.
        smoothing: Points in the running mean; 1 draws none.
        from_zero: Whether the y axis begins at 0.
    """
    figure = new_figure()
    axes = figure.add_subplot()
    for number, (name, points) in enumerate(islice(lines.items(), MOST_LINES)):
        steps, values = zip(*points, strict=True)
        color = f"C{number}" if number else _INK
        if len(points) > 2 * smoothing > 2:
            axes.plot(*zip(*_thinned(points), strict=True), color=_PALE if not number else color, linewidth=0.8)
            means = [sum(values[max(0, i - smoothing + 1) : i + 1]) / min(i + 1, smoothing) for i in range(len(values))]
            smooth = _thinned(list(zip(steps, means, strict=True)))
            axes.plot(*zip(*smooth, strict=True), color=color, label=f"{safe_label(name)} (mean of {smoothing})")
        else:
            thinned = zip(*_thinned(points), strict=True)
            axes.plot(*thinned, color=color, marker="o", markersize=3, label=safe_label(name))
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(ylabel)
    if from_zero:
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return svg_text(figure)


def heat_map(values: Mapping[str, Mapping[str, float]], *, label: str) -> str:
    """Draw a cell for each layer (across) and kind of module (down); kinds that a layer lacks stay blank.

    Args:
        values: Kind -> layer -> value.
        label: Label of the colour bar.
    """
    values = dict(islice(values.items(), _MOST_KINDS))
    layers = list(dict.fromkeys(layer for row in values.values() for layer in row))
    grid = [[row.get(layer, float("nan")) for layer in layers] for row in values.values()]
    figure = new_figure(height=1.4 + 0.28 * len(values))
    axes = figure.add_subplot()
    image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=0)
    axes.set_yticks(range(len(values)), [safe_label(kind) for kind in values])
    every = -(-len(layers) // 16)
    axes.set_xticks(range(0, len(layers), every), [safe_label(layer) for layer in layers[::every]])
    axes.set_xlabel("block")
    figure.colorbar(image, label=label)
    return svg_text(figure)


def spectra(singular_values: Mapping[str, Sequence[float]], *, lora_rank: int) -> str:
    """Draw the singular values of some layers' updates, divided by the largest, and the rank of a LoRA of equal size.

    Args:
        singular_values: Layer -> singular values, descending.
        lora_rank: Rank of a LoRA with as many parameters per layer.
    """
    figure = new_figure()
    axes = figure.add_subplot()
    for name, values in singular_values.items():
        shown = [value / values[0] for value in values if value > values[0] * 1e-6]
        axes.semilogy(range(1, len(shown) + 1), shown, label=safe_label(name))
    axes.axvline(lora_rank + 0.5, color="#b23a48", linestyle="--")
    axes.annotate(
        f"a LoRA of equal size ends at rank {lora_rank}",
        (lora_rank + 0.5, 1.0),
        xytext=(6, -2),
        textcoords="offset points",
        color="#b23a48",
        fontsize=9,
    )
    axes.set_xlabel("number of the singular value")
    axes.set_ylabel("singular value / largest")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False, fontsize=8)
    return svg_text(figure)
