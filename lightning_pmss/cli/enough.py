"""``python -m lightning_pmss enough``: options, checks before any run, and what is printed and written."""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from lightning_pmss.datamodules.base import TokenisedDataModule
    from lightning_pmss.enough.plan import Plan
    from lightning_pmss.enough.study import Study

EPILOG = (
    "All options of fit may follow, such as --config RECIPE --config OVERLAY, --data.path FOLDER and --trainer.max_steps 200."
    " The same command continues a stopped study; more sizes or seeds may be added to it. More: docs/enough.md."
)
_RESULT = "enough.json"
_LARGEST_SEED = 2**32 - 1  # of NumPy


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The tool's options."""
    parser.epilog = EPILOG
    parser.allow_abbrev = False  # --model is an option of fit
    parser.add_argument("--config", action="append", default=[], metavar="RECIPE", help="as for fit; may be repeated")
    parser.add_argument("--sizes", required=True, metavar="N,N,...", help="training examples, increasing")
    parser.add_argument("--seeds", type=int, default=3, metavar="K", help="runs of each size (default: %(default)s)")
    parser.add_argument(
        "--equal",
        choices=("steps", "epochs"),
        default="steps",
        help="what runs of all sizes have equally many of, those of the recipe (default: %(default)s)",
    )
    parser.add_argument(
        "--monitor", default="val/loss", metavar="METRIC", help="score, logged in validation (default: %(default)s)"
    )
    parser.add_argument(
        "--mode", choices=("min", "max"), default="min", help="whether less or more is better (default: %(default)s)"
    )
    parser.add_argument(
        "--score",
        choices=("last", "best"),
        default="last",
        help="the score after the last step, or the best of --validations (default: %(default)s)",
    )
    parser.add_argument("--validations", type=int, metavar="N", help="in each run (default: 1; 10 with --score best)")
    parser.add_argument(
        "--by",
        metavar="KIND",
        help="what subsets keep the shares of, as --data.train_limit_by: kind, a column of conversations, or none"
        " (default: the recipe's, else kind where the data has kinds)",
    )
    parser.add_argument("--output", metavar="DIR", help="folder of the study (default: runs/enough/RECIPE)")


def run(parser: argparse.ArgumentParser, args: Sequence[str]) -> None:
    """Parse, check, train, print.

    Raises:
        ValueError: Options, recipe or data are refused.
        OSError: A file cannot be read or written, or the folder is of another study.
        ModuleNotFoundError: The library that draws is not installed.
        SystemExit: A run failed, or the study was interrupted; the same command continues it.
    """
    add_arguments(parser)
    given, rest = parser.parse_known_args(args)
    sizes = _sizes(given.sizes)
    if given.seeds < 1:
        raise ValueError(f"--seeds {given.seeds}: give at least 1; from 3 on intervals are of use.")
    validations = given.validations if given.validations is not None else 10 if given.score == "best" else 1
    if validations < 1 or given.score == "best" and validations < 2:
        raise ValueError(f"--validations {validations}: give at least {2 if given.score == 'best' else 1}.")
    from lightning_pmss.enough.page import check_library

    check_library()
    words = [word for file in given.config for word in ("--config", file)] + rest
    name = Path(given.config[0]).stem if given.config else "study"
    output = Path(given.output or Path("runs", "enough", name)).expanduser()
    plan = _plan(words, sizes, given, validations, output)

    from lightning_pmss.enough.study import Study, open_study
    from lightning_pmss.runs import process
    from lightning_pmss.store.disk import held

    open_study(plan)
    console = _Console()
    study = Study(plan, process.PROGRAM, console.announce, console.note)
    print(_heading(plan, sizes, given.seeds), flush=True)
    if plan.seen is not None:
        steps = math.ceil(sizes[-1] * plan.steps_per_example)
        print(
            f"warning: {plan.steps:,} steps are over after {plan.seen:,} examples, so larger sizes are worth no more; give"
            f" --trainer.max_steps {steps}, or --equal epochs.",
            file=sys.stderr,
            flush=True,
        )
    try:
        with held(output, f"another process works on the study {output}. Wait for its end, or name another --output."):
            study.train(lambda: _write(study, given))
    except KeyboardInterrupt:
        console.announce("\nstopped. The same command continues the study.")
        raise SystemExit(130) from None
    _print(study, given)
    if study.failures:
        raise SystemExit(1)


def _sizes(text: str) -> tuple[int, ...]:
    """The numbers of ``--sizes``."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(f"--sizes {text}: give numbers of examples with commas, such as --sizes 50,200,800,3200.")
    sizes = tuple(map(int, parts))
    if any(before >= after for before, after in itertools.pairwise(sizes)):
        ordered = ",".join(map(str, sorted(set(sizes))))
        raise ValueError(f"--sizes {text}: sizes increase, each is there once; type --sizes {ordered}.")
    return sizes


def _plan(words: list[str], sizes: tuple[int, ...], given: argparse.Namespace, validations: int, output: Path) -> Plan:
    """Read recipe and data, and check everything that can be checked before a run."""
    from lightning_pmss.cli.lightning import DataCLI
    from lightning_pmss.cli.preview import run_of
    from lightning_pmss.datamodules.base import TokenisedDataModule
    from lightning_pmss.datamodules.options import KIND
    from lightning_pmss.datamodules.summary import batches_of
    from lightning_pmss.enough.plan import Plan, refuse_early_ends

    by = [] if given.by is None else [f"--data.train_limit_by={'null' if given.by == 'none' else given.by}"]
    with warnings.catch_warnings():  # Lightning's, about options that are not those of the process
        warnings.filterwarnings("ignore", "LightningCLI's args parameter is intended")
        cli = DataCLI(["fit", *words, *by])
    module = cli.datamodule
    if not isinstance(module, TokenisedDataModule):
        what = "no --data was given" if module is None else f"{type(module).__name__} has no --data.train_limit"
        raise ValueError(
            f"{what}; enough takes data modules of this library and subclasses, such as --data ChatDataModule."
        )
    recipe: dict[str, Any] = yaml.safe_load(cli.recipe)
    if recipe.get("ckpt_path") is not None:
        raise ValueError("--ckpt_path: every run begins at the base model. Leave the option out.")
    trainer = recipe.get("trainer") or {}
    refuse_early_ends(trainer.get("callbacks"))
    for option in ("max_time", "fast_dev_run", "overfit_batches"):
        if trainer.get(option):
            raise ValueError(f"--trainer.{option} {trainer[option]}: runs have the same length; leave the option out.")
    seed = recipe.get("seed_everything")
    if isinstance(seed, int) and not 0 <= seed <= _LARGEST_SEED + 1 - given.seeds:
        raise ValueError(
            f"--seed_everything {seed}: the seeds of runs count up from it; give a number from 0 to"
            f" {_LARGEST_SEED + 1 - given.seeds}."
        )
    if (limit := trainer.get("limit_train_batches")) not in (None, 1.0) or isinstance(limit, int):
        raise ValueError(
            f"--trainer.limit_train_batches {limit}: --sizes limits the examples; leave the option out, or type 1.0."
        )
    module.setup("fit")
    _check_data(module, sizes)
    settings = run_of(cli.trainer_options)
    batches = batches_of(module, settings)
    steps, per_epoch = settings.steps(batches), settings.steps_per_epoch(batches)
    if not steps or not per_epoch:
        raise ValueError(
            "this recipe has no end, or no step; give --trainer.max_steps or --trainer.max_epochs, and batches to train on."
        )
    if given.equal == "epochs" and steps % per_epoch:
        raise ValueError(
            f"--equal epochs: the recipe ends after {steps / per_epoch:.2f} epochs ({steps:,} steps); give whole ones, such as"
            f" --trainer.max_steps -1 --trainer.max_epochs {max(1, round(steps / per_epoch))}."
        )
    kind: str | None = module.train_limit_by
    if given.by is None and kind is None and module.has_kinds:
        kind = KIND
    return Plan(
        recipe,
        sizes,
        given.seeds,
        given.equal,
        steps,
        steps // per_epoch,
        per_epoch / len(module.data["train"]),
        kind,
        validations,
        given.monitor,
        {
            "available": module.available,
            "validation": len(module.data["val"]),
            "fingerprints": [module.data[split]._fingerprint for split in ("train", "val")],
        },
        output,
    )


def _check_data(module: TokenisedDataModule, sizes: tuple[int, ...]) -> None:
    """Refuse data without validation, or with fewer examples than the largest size."""
    if not len(module.data["val"]):
        raise ValueError("there are no validation examples to score on; give --data.val_size 200.")
    most = module.available
    if sizes[-1] > most:
        fitting = [str(size) for size in sizes if size < most]
        raise ValueError(
            f"--sizes: {sizes[-1]:,} examples are more than the {most:,} to train on (without {len(module.data['val']):,} for"
            f" validation); type --sizes {','.join([*fitting, str(most)])}, or give more data."
        )


def _heading(plan: Plan, sizes: tuple[int, ...], seeds: int) -> str:
    length = f"{plan.steps:,} steps" if plan.equal == "steps" else f"{plan.epochs:,} epochs"
    count = f"{len(sizes)} {'size' if len(sizes) == 1 else 'sizes'}, {seeds} {'seed' if seeds == 1 else 'seeds'}"
    return (
        f"{count}: {len(sizes) * seeds} runs of {length} in {plan.output}; {plan.drawn}."
        f" {plan.data['validation']:,} examples to validate on, the same for all runs."
    )


def _result(study: Study, given: argparse.Namespace) -> Any:
    from lightning_pmss.enough.result import result_of
    from lightning_pmss.enough.study import scores_of

    found, infinite = scores_of(study.records, given.monitor, given.score, given.mode)
    return result_of(found, given.monitor, given.mode, given.score, len(infinite) + len(study.failures))


def _write(study: Study, given: argparse.Namespace) -> None:
    """Write what is known so far."""
    from lightning_pmss.enough.page import write_page
    from lightning_pmss.enough.result import write_result

    result = _result(study, given)
    failures = {run.folder.name: reason for run, reason in study.failures.items()}
    plan = study.plan
    length = {"steps": plan.steps} if plan.equal == "steps" else {"epochs": plan.epochs}
    settings = {"equal": plan.equal, **length, "train_limit_by": plan.kind, "failures": failures}
    write_result(plan.output / _RESULT, result, settings)
    if result.scores:
        write_page(plan, result)


def _print(study: Study, given: argparse.Namespace) -> None:
    from lightning_pmss.enough.page import PAGE
    from lightning_pmss.enough.result import sentences, table, text_table

    result = _result(study, given)
    if result.scores:
        print(f"\n{text_table(table(result))}\n")
        print("\n".join(sentences(result)))
        print(f"\nwritten: {study.plan.output / _RESULT}, {study.plan.output / PAGE}")
    if study.failures:
        names = "; ".join(run.name for run in study.failures)
        print(
            f"{len(study.failures)} of {len(list(study.plan.runs()))} runs failed: {names}. The same command tries them again.",
            file=sys.stderr,
        )


class _Console:
    """Prints lines, and on a terminal a line of progress that the next one replaces."""

    def __init__(self) -> None:
        self._noted = 0

    def announce(self, line: str) -> None:
        self._clear()
        print(line, flush=True)

    def note(self, line: str) -> None:
        if not sys.stdout.isatty():
            return
        self._clear()
        self._noted = len(line)
        print(line, end="\r", flush=True)

    def _clear(self) -> None:
        if self._noted:
            print(" " * self._noted, end="\r")
        self._noted = 0
