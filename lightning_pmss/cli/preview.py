"""``python -m lightning_pmss preview``: training data as the model will see it, without the model."""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_pmss.datamodules.summary import Run, Summary

EPILOG = (
    "All options of fit may follow, such as --config RECIPE, --model.model_name_or_path and --data.*; the model's weights are"
    " not loaded. Tokenised data goes into the cache that fit reads."
)
_MARK = b'content="lightning-pmss preview"'


def run(parser: argparse.ArgumentParser, args: Sequence[str]) -> None:
    """Parse, read the data, print.

    Raises:
        ValueError: The options or the data are wrong.
        OSError: The data cannot be read or the page not be written.
    """
    parser.epilog = EPILOG
    parser.allow_abbrev = False  # --model is an option of fit
    parser.add_argument("--rows", type=int, default=3, metavar="N", help="rows to show (default: %(default)s)")
    parser.add_argument("--html", metavar="FILE", help="write a page with the same content there too")
    parser.add_argument("--overwrite", action="store_true", help="replace the page if it exists")
    parser.add_argument(
        "--tokens-per-second",
        type=float,
        metavar="X",
        help="speed of all devices together, for an estimate of the time",
    )
    given, rest = parser.parse_known_args(args)
    if given.rows < 0:
        raise ValueError(f"--rows {given.rows}: give a number of rows, 0 for none.")
    if given.tokens_per_second is not None and not 0 < given.tokens_per_second < math.inf:
        raise ValueError(f"--tokens-per-second {given.tokens_per_second}: give a finite speed above 0.")
    page = None if given.html is None else Path(given.html).expanduser()
    if page is not None:
        _refuse_existing(page, given.overwrite)

    from lightning_pmss.cli.lightning import DataCLI
    from lightning_pmss.cli.preview_text import in_colour, text_of
    from lightning_pmss.datamodules.base import TokenisedDataModule
    from lightning_pmss.datamodules.summary import summarise

    with warnings.catch_warnings():  # Lightning's, about options that are not those of the process
        warnings.filterwarnings("ignore", "LightningCLI's args parameter is intended")
        cli = DataCLI(["fit", *rest])
    module = cli.datamodule
    if not isinstance(module, TokenisedDataModule):
        kind = (
            "no --data was given"
            if module is None
            else f"{type(module).__name__} makes its batches in a way of its own"
        )
        raise ValueError(
            f"{kind}; preview shows data modules of this library and subclasses, such as --data ChatDataModule."
        )
    module.setup("fit")  # not `prepare_data`, which would read a test set as well
    summary = summarise(module, given.rows, run_of(cli.trainer_options))
    print(text_of(summary, given.tokens_per_second, in_colour(sys.stdout)))
    if page is not None:
        _write(page, summary, given.tokens_per_second)
        print(f"\nwritten: {page}")


def run_of(options: Any) -> Run:
    """Return the settings of the run that its steps depend on."""
    from lightning_pmss.datamodules.summary import Run

    return Run(
        _devices(options.accelerator, options.devices) * options.num_nodes,
        options.accumulate_grad_batches,
        options.max_epochs,
        options.max_steps,
        1.0 if options.limit_train_batches is None else options.limit_train_batches,
    )


def _devices(accelerator: Any, devices: Any) -> int:
    """Return how many processes a node has: as asked for, or those that this machine would have."""
    if isinstance(devices, int) and devices >= 0:
        return devices
    if isinstance(devices, (list, tuple)):
        return len(devices)
    text = str(devices)
    if text.isdecimal():
        return int(text)
    if "," in text:
        return len([part for part in text.split(",") if part.strip()])
    import torch

    return max(1, torch.cuda.device_count()) if accelerator in ("auto", "gpu", "cuda") else 1


def _refuse_existing(page: Path, overwrite: bool) -> None:
    """An earlier preview may be replaced if that is asked for, and nothing else."""
    if not page.parent.is_dir():
        raise FileNotFoundError(f"--html {page}: the folder {page.parent} does not exist; make it first.")
    if not page.exists():
        return
    if page.is_dir():
        raise FileExistsError(f"--html {page} is a folder; name a file, such as {page / 'preview.html'}.")
    if not overwrite:
        raise FileExistsError(f"{page} exists; type another --html or --overwrite.")
    if not page.is_file() or _MARK not in page.read_bytes()[:4096]:
        raise FileExistsError(f"{page} is not a preview, and overwriting would destroy it. Name another file.")


def _write(page: Path, summary: Summary, speed: float | None) -> None:
    from jinja2 import Environment

    from lightning_pmss.cli.preview_text import tables
    from lightning_pmss.store.disk import atomic_file

    source = resources.files("lightning_pmss.cli").joinpath("preview.html.jinja").read_text(encoding="utf-8")
    most = max(count for *_, count in summary.histogram())
    template = Environment(autoescape=True).from_string(source)
    text = template.render(summary=summary, tables=tables(summary, speed), most=most)
    with atomic_file(page) as new:
        new.write_text(text, encoding="utf-8")
