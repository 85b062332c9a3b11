"""The page: figures, curves, the update layer by layer, scores, configuration. One HTML file that needs no other."""

from __future__ import annotations

import importlib.util
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import lightning_pmss.run_report.pictures as pictures
from lightning_pmss.coordinates import trained_shape
from lightning_pmss.disk import atomic_file
from lightning_pmss.files.inspection import Inspection, inspect_adapter
from lightning_pmss.run_report.run import Curve, Run, read_run

_MARK = b"<title>PMSS run "  # what every page of ours begins with


@dataclass
class Section:
    """One part of the page; what is empty is left out."""

    title: str
    picture: str = ""
    rows: Sequence[tuple[str, ...]] | None = None
    note: str = ""
    text: str = ""


def write_report(
    run_dir: str | Path, output: str | Path | None = None, *, base: str | Path | None = None, overwrite: bool = False
) -> Path:
    """Write the page of a run.

    Args:
        run_dir: The run's log folder.
        output: File to write; by default ``report.html`` in the run's folder.
        base: Folder of the base model, for norms and spectra of the updates; by default the one that the adapter names.
        overwrite: Whether an existing file may be replaced.

    Returns:
        The file's path.

    Raises:
        FileNotFoundError: If the folder is no run's, or `base` has no weights.
        FileExistsError: If the file exists and is not to be replaced, or is no page of a run.
        ModuleNotFoundError: If matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError("The report draws with matplotlib: pip install -c constraints.txt -e '.[plots]'")
    run = read_run(run_dir)
    target = Path(output).expanduser() if output is not None else run.folder / "report.html"
    _refuse_existing(target, overwrite)
    inspection, why = _inspection(run, base)
    sections = [*_curves(run), *_update(inspection, why), *_results(run), *_configuration(run)]
    from jinja2 import Environment

    template = files("lightning_pmss.run_report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    page = (
        Environment(autoescape=True)
        .from_string(template)
        .render(
            title=f"PMSS run {run.folder.resolve().parent.name}/{run.folder.name}",
            subtitle=_subtitle(run),
            figures=_figures(run, inspection),
            sections=sections,
        )
    )
    with atomic_file(target) as file:
        file.write(page.encode())
    return target


def _refuse_existing(target: Path, overwrite: bool) -> None:
    """An earlier page may be replaced if that is asked for, and nothing else."""
    if not target.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{target} exists; type another --output or --overwrite.")
    if not target.is_file() or _MARK not in target.read_bytes()[:4096]:
        raise FileExistsError(f"{target} is no page of a run, and overwriting would destroy it. Name another file.")


def _inspection(run: Run, base: str | Path | None) -> tuple[Inspection | None, str]:
    """The adapter's tensors looked at, with the base where it is at hand, else why it is not."""
    if run.adapter is None:
        return None, "No adapter in the run's folder."
    if base is not None:
        return inspect_adapter(run.adapter, base), ""
    named = run.adapter_config.get("base_model_name_or_path")
    if named and Path(named).expanduser().is_dir():
        return inspect_adapter(run.adapter, named), ""
    why = f"The base {named!r} is no folder here: the spectra need it. Type --base MODEL_DIR."
    return inspect_adapter(run.adapter), why


def _subtitle(run: Run) -> str:
    parts = [f"base {name}" for name in [run.adapter_config.get("base_model_name_or_path")] if name]
    if config := run.adapter_config.get("config"):
        parts.append(f"rank {config['rank']}, {config['selection']}, {config['coordinates']} coordinates")
    return "; ".join(parts)


def _figures(run: Run, inspection: Inspection | None) -> list[tuple[str, str]]:
    """Name and value of the page's first figures."""
    # Lightning counts a logged step from 0; what is logged when training has ended counts one more.
    trained = [curve[-1][0] + 1 for name, curve in run.curves.items() if not name.startswith("test/")]
    found = [("steps", f"{max(trained):,}" if trained else None)]
    for name in ("train/loss", "val/loss", "test/loss"):
        value = run.last(name)
        found.append((f"{name}, last", None if value is None else f"{value:.4f}"))
    if inspection is not None:
        shapes = [trained_shape(inspection.config["coordinates"], layer.rank) for layer in inspection.layers]
        found.append(("trained parameters in U", f"{sum(map(math.prod, shapes)):,}"))
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
    sections = []
    if losses:
        sections.append(Section("Loss", pictures.curves(losses, ylabel="loss", smoothing=10)))
    if scores:
        sections.append(Section("Scores in validation", pictures.curves(scores, ylabel="score")))
    if speed := run.curves.get("pmss/tokens_per_second"):
        lines = {"tokens per second": speed}
        sections.append(
            Section("Throughput", pictures.curves(lines, ylabel="tokens / s", smoothing=10, from_zero=True))
        )
    if memory := run.curves.get("pmss/peak_memory_gb"):
        picture = pictures.curves({"peak so far": memory}, ylabel="GB (10^9 bytes)", from_zero=True)
        sections.append(Section("Memory", picture))
    return sections


def _update(inspection: Inspection | None, why: str) -> list[Section]:
    if inspection is None:
        return [Section("The update", note=why)]
    with_base = all(layer.update_norm is not None for layer in inspection.layers)
    cells: dict[str, dict[str, float]] = {}
    for layer in inspection.layers:
        kind, block = _kind_and_block(layer.name)
        cells.setdefault(kind, {})[block] = float(layer.update_norm if with_base else layer.u_norm)  # type: ignore[arg-type]
    label = "norm of s C U R" if with_base else "norm of s U"
    sections = [Section("The update, layer by layer", pictures.heat_map(cells, label=label), note=why)]
    if with_base:
        strongest = sorted(inspection.layers, key=lambda layer: -float(layer.update_norm or 0.0))[:5]
        spectra = {layer.name: layer.singular_values or [] for layer in strongest if layer.update_norm}
        if spectra:
            ranks = [max(1, round(x.rank**2 / sum(x.shape))) for x in strongest]
            picture = pictures.spectra(spectra, lora_rank=int(statistics.median(ranks)))
            note = (
                "Singular values of s C U R for the five layers with the largest update. The line is where the rank of a"
                " LoRA with as many trained parameters ends; no LoRA was trained for this picture."
            )
            sections.append(Section("Spectrum of the update", picture, note=note))
    return sections


def _kind_and_block(name: str) -> tuple[str, str]:
    """``model.layers.3.mlp.up_proj`` -> (``mlp.up_proj``, ``3``); without a number the block is "-"."""
    found = re.search(r"(?:^|\.)(\d+)\.(.+)$", name)
    return (found[2], found[1]) if found else (name, "-")


def _results(run: Run) -> list[Section]:
    sections = []
    for stage, told in run.summaries.items():
        rows: list[tuple[str, ...]] = [("score", "mean", "95 % interval", "examples")]
        for name, part in told.get("scores", {}).items():
            interval = f"{part['low']:.4f} to {part['high']:.4f}"
            rows.append((name, f"{part['mean']:.4f}", interval, f"{part['n']:,}"))
        sections.append(Section(f"Scores: {stage}", rows=rows))
    if run.sizes:
        sizes = [(name, f"{size:,}") for name, size in run.sizes.items()]
        sections.append(Section("On disk", rows=[("results", "bytes"), *sizes]))
    return sections


def _configuration(run: Run) -> list[Section]:
    versions = run.adapter_config.get("versions", {})
    sections = [Section("Configuration", text=run.config)] if run.config else []
    if versions:
        sections.append(Section("Versions", rows=[("library", "version"), *versions.items()]))
    return sections
