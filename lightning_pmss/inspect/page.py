"""Write the page of a run as one HTML file: figures, curves, the update layer by layer, scores, configuration."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path

import lightning_pmss.inspect.pictures as pictures
from lightning_pmss.inspect.inspection import Inspection, inspect_adapter
from lightning_pmss.inspect.run import ADAPTER_CONFIG, Curve, Run, read_run
from lightning_pmss.messages import one_line
from lightning_pmss.store.disk import atomic_file
from lightning_pmss.store.shards import open_shards

_MARK = b"<title>PMSS run "  # near the start of every page


@dataclass
class Section:
    """One part of the page, without its empty fields. ``fault`` describes the error in a file that it would have shown."""

    title: str
    picture: str = ""
    rows: Sequence[tuple[str, ...]] | None = None
    note: str = ""
    text: str = ""
    fault: str = ""


def write_report(
    run_dir: str | Path,
    output: str | Path | None = None,
    *,
    base: str | Path | None = None,
    overwrite: bool = False,
    announce: Callable[[str], object] | None = None,
) -> Path:
    """Write the page of a run. A part that cannot be read or drawn is replaced by the error.

    Args:
        run_dir: The run's log folder.
        output: File to write; by default ``report.html`` in the run's folder.
        base: Folder of the base model, for norms and spectra of the updates; by default the one that the adapter names.
        overwrite: Replace an earlier page.
        announce: Called with a sentence for each part that is not shown.

    Returns:
        Path of the page.

    Raises:
        FileNotFoundError: Not a folder of a run, or ``base`` has no weights.
        FileExistsError: The file exists and ``overwrite`` is not given, or it is not a page of a run.
        ValueError: None of the run's files can be read, or ``base`` is damaged.
        ModuleNotFoundError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError("The report draws with matplotlib: pip install -c constraints.txt -e '.[plots]'")
    run = read_run(run_dir)
    target = Path(output).expanduser() if output is not None else run.folder / "report.html"
    _refuse_existing(target, overwrite)
    if base is not None:
        open_shards(base).close()
    inspection, note, fault = _inspection(run, base)
    sections = [*_curves(run), *_update(inspection, note, fault), *_results(run), *_configuration(run)]
    for section in sections:
        if section.fault and announce is not None:
            announce(f"{section.title}: {section.fault}")
    page = render(
        title=f"PMSS run {run.folder.resolve().parent.name}/{run.folder.name}",
        subtitle=_subtitle(run, inspection),
        figures=_figures(run, inspection),
        sections=sections,
    )
    with atomic_file(target) as new:
        new.write_bytes(page.encode())
    return target


def render(title: str, subtitle: str, figures: Sequence[tuple[str, str]], sections: Sequence[Section]) -> str:
    """Return a page as HTML; its title is cut to one line.

    Args:
        title: Of the page.
        subtitle: Below it.
        figures: Names and values at the top.
        sections: Its parts.
    """
    from jinja2 import Environment

    template = files("lightning_pmss.inspect").joinpath("page.html.jinja").read_text(encoding="utf-8")
    made = Environment(autoescape=True).from_string(template)
    return made.render(title=one_line(title), subtitle=subtitle, figures=figures, sections=sections)


def _refuse_existing(target: Path, overwrite: bool) -> None:
    """Refuse to replace a file without ``overwrite``, or any file but an earlier page."""
    if not target.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{target} exists; type another --output or --overwrite.")
    if not target.is_file() or _MARK not in target.read_bytes()[:4096]:
        raise FileExistsError(f"{target} is not a page of a run, and overwriting would destroy it. Name another file.")


def picture_section(title: str, draw: Callable[[], str], note: str = "", fault: str = "") -> Section:
    """Make a section with a picture, or with the reason why it cannot be drawn."""
    try:
        return Section(title, draw(), note=note, fault=fault)
    except (ArithmeticError, RuntimeError, ValueError) as error:
        return Section(title, note=note, fault=f"{fault} Not drawn: {one_line(error)}".strip())


def _inspection(run: Run, base: str | Path | None) -> tuple[Inspection | None, str, str]:
    """Inspect the adapter, with its base if there is one; else return the reason, as a note or as a fault."""
    if run.adapter is None:
        fault = run.faults.get(str(ADAPTER_CONFIG), "")
        return None, "" if fault else "No adapter in the run's folder.", fault
    named, note, fault = base or run.about.base_model_name_or_path, "", ""
    if base is not None or named and Path(named).expanduser().is_dir():
        try:
            return inspect_adapter(run.adapter, named), "", ""
        except (ArithmeticError, OSError, RuntimeError, ValueError) as error:  # LinAlgError is a RuntimeError
            fault = f"Without the base {one_line(named)}: {one_line(error)}"
    else:
        note = f"The spectra need the base, and {named!r} is not a folder here. Type --base MODEL_DIR."
    try:
        return inspect_adapter(run.adapter), one_line(note), fault
    except (OSError, ValueError) as error:
        return None, "", one_line(error)


def _subtitle(run: Run, inspection: Inspection | None) -> str:
    parts = [f"base {one_line(name)}" for name in [run.about.base_model_name_or_path] if name]
    if inspection is not None:
        parts.append(inspection.options)
    return "; ".join(parts)


def _figures(run: Run, inspection: Inspection | None) -> list[tuple[str, str]]:
    """List names and values of the figures at the top of the page."""
    # Lightning numbers logged steps from 0.
    trained = [curve[-1][0] + 1 for name, curve in run.curves.items() if not name.startswith("test/")]
    found = [("steps", f"{max(trained):,}" if trained else None)]
    for name in ("train/loss", "val/loss", "test/loss"):
        value = run.last(name)
        found.append((f"{name}, last", None if value is None else f"{value:.4f}"))
    if inspection is not None:
        found.append(("trained parameters in the adapter", f"{inspection.trained:,}"))
    if "adapter" in run.sizes:
        found.append(("adapter", f"{run.sizes['adapter'] / 1e6:.1f} MB"))
    if speed := run.curves.get("pmss/tokens_per_second"):
        found.append(("tokens per second, median", f"{statistics.median(v for _, v in speed):,.0f}"))
    if (memory := run.last("pmss/peak_memory_gb")) is not None:
        found.append(("peak memory", f"{memory:.2f} GB"))
    return [(name, value) for name, value in found if value is not None]


def _curves(run: Run) -> list[Section]:
    losses: dict[str, Curve] = {name: run.curves[name] for name in ("train/loss", "val/loss") if name in run.curves}
    scores = {n: c for n, c in run.curves.items() if n.startswith("val/") and n != "val/loss"}
    sections = _fault(run, "metrics.csv", "Curves")
    if losses:
        sections.append(picture_section("Loss", lambda: pictures.curves(losses, ylabel="loss", smoothing=10)))
    if scores:
        more = f"The first {pictures.MOST_LINES} of {len(scores)}." if len(scores) > pictures.MOST_LINES else ""
        sections.append(picture_section("Scores in validation", lambda: pictures.curves(scores, ylabel="score"), more))
    if speed := run.curves.get("pmss/tokens_per_second"):
        lines = {"tokens per second": speed}
        draw = partial(pictures.curves, lines, ylabel="tokens / s", smoothing=10, from_zero=True)
        sections.append(picture_section("Throughput", draw))
    if memory := run.curves.get("pmss/peak_memory_gb"):
        draw = partial(pictures.curves, {"peak so far": memory}, ylabel="GB (10^9 bytes)", from_zero=True)
        sections.append(picture_section("Memory", draw))
    return sections


def _update(inspection: Inspection | None, note: str, fault: str) -> list[Section]:
    title = "The update, layer by layer"
    if inspection is None:
        return [Section("The update", note=note, fault=fault)]
    with_base = all(layer.update_norm is not None for layer in inspection.layers)
    cells: dict[str, dict[str, float]] = {}
    for layer in inspection.layers:
        kind, block = _kind_and_block(layer.name)
        cells.setdefault(kind, {})[block] = float(layer.update_norm if with_base else layer.u_norm)  # type: ignore[arg-type]
    label = "norm of s C U R" if with_base else "norm of s U"
    sections = [picture_section(title, lambda: pictures.heat_map(cells, label=label), note, fault)]
    if with_base:
        strongest = sorted(inspection.layers, key=lambda layer: -float(layer.update_norm or 0.0))[:5]
        spectra = {layer.name: layer.singular_values or [] for layer in strongest if layer.update_norm}
        if spectra:
            ranks = [max(1, round(x.rank**2 / sum(x.shape))) for x in strongest]
            rank = int(statistics.median(ranks))
            text = (
                "Singular values of s C U R for the five layers with the largest update. The line marks the rank of a LoRA"
                " with as many trained parameters; no LoRA was trained for this picture."
            )
            draw = partial(pictures.spectra, spectra, lora_rank=rank)
            sections.append(picture_section("Spectrum of the update", draw, text))
    return sections


def _kind_and_block(name: str) -> tuple[str, str]:
    """Split ``model.layers.3.mlp.up_proj`` into (``mlp.up_proj``, ``3``); without a number the block is "-"."""
    parts = name.split(".")
    place = next((place for place, part in enumerate(parts[:-1]) if part.isdecimal()), None)
    return (name, "-") if place is None else (".".join(parts[place + 1 :]), parts[place])


def _results(run: Run) -> list[Section]:
    sections = []
    for name in run.faults:
        if name.startswith("summary-"):
            sections += _fault(run, name, f"Scores: {one_line(Path(name).stem.removeprefix('summary-'))}")
    for stage, scores in run.summaries.items():
        rows: list[tuple[str, ...]] = [("score", "mean", "95 % interval", "examples")]
        for name, part in scores.items():
            rows.append((one_line(name), f"{part.mean:.4f}", f"{part.low:.4f} to {part.high:.4f}", f"{part.n:,}"))
        sections.append(Section(f"Scores: {stage}", rows=rows))
    if run.sizes:
        sizes = [(name, f"{size:,}") for name, size in run.sizes.items()]
        sections.append(Section("On disk", rows=[("results", "bytes"), *sizes]))
    return sections


def _configuration(run: Run) -> list[Section]:
    sections = _fault(run, "config.yaml", "Configuration")
    if run.config:
        sections.append(Section("Configuration", text=run.config))
    if run.about.versions:
        rows = [(one_line(name), one_line(version)) for name, version in run.about.versions.items()]
        sections.append(Section("Versions", rows=[("library", "version"), *rows]))
    return sections


def _fault(run: Run, name: str, title: str) -> list[Section]:
    """Make a section that reports a damaged file, if it is damaged."""
    return [Section(title, fault=run.faults[name])] if name in run.faults else []
