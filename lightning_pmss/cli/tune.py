"""``python -m lightning_pmss tune``: options, checks before any trial, and what is printed and written."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lightning_pmss.store.disk import atomic_file

if TYPE_CHECKING:
    from lightning_pmss.cli.recipe import Recipe
    from lightning_pmss.search.search import Search
    from lightning_pmss.search.space import Space

EPILOG = (
    "All options of fit may follow, such as --config RECIPE, --data.path FOLDER and --trainer.devices 2. The same command"
    " continues a stopped search, and joins a running one from another terminal or node. More: docs/tune.md."
)
_SAMPLERS = ("tpe", "random")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The tool's options."""
    parser.epilog = EPILOG
    parser.allow_abbrev = False  # --model is an option of fit
    parser.add_argument("--config", action="append", metavar="RECIPE", help="as for fit; may be repeated")
    parser.add_argument("--space", metavar="FILE", help="what varies, such as configs/tune/default.yaml")
    parser.add_argument(
        "--trials", type=int, default=30, metavar="N", help="trials in the study (default: %(default)s)"
    )
    parser.add_argument(
        "--fraction",
        type=float,
        default=0.2,
        metavar="X",
        help="share of the training after which a trial stops (default: %(default)s)",
    )
    parser.add_argument(
        "--finish", type=int, default=5, metavar="K", help="best trials trained to their end (default: %(default)s)"
    )
    parser.add_argument("--study", metavar="NAME", help="name of the study (default: that of the first recipe)")
    parser.add_argument(
        "--storage",
        metavar="URL",
        help="database, such as postgresql://USER@HOST/NAME (default: study.db in the output folder, by SQLite)",
    )
    parser.add_argument("--output", metavar="DIR", help="folder of the trials (default: runs/tune/NAME)")
    parser.add_argument(
        "--monitor", default="val/loss", metavar="METRIC", help="what is compared (default: %(default)s)"
    )
    parser.add_argument(
        "--mode", choices=("min", "max"), default="min", help="whether less or more is better (default: %(default)s)"
    )
    parser.add_argument(
        "--sampler", choices=_SAMPLERS, default="tpe", help="Bayesian, or random for comparison (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sampler (default: %(default)s)")
    parser.add_argument(
        "--launcher",
        metavar="WORDS",
        help="what starts a trial in the place of python, such as 'torchrun --nproc-per-node 8'",
    )
    parser.add_argument("--show", metavar="NAME", help="print the table of a study, and run nothing")


def run(parser: argparse.ArgumentParser, args: Sequence[str]) -> None:
    """Parse, check, search, print.

    Raises:
        ValueError: Options, space, study or database are refused, or the first trials all fail.
        OSError: A file cannot be read or written.
        ModuleNotFoundError: The extra is not installed.
        SystemExit: The search was interrupted; it can be continued.
    """
    add_arguments(parser)
    given, rest = parser.parse_known_args(args)
    for library in ("optuna", "matplotlib"):
        if importlib.util.find_spec(library) is None:
            raise ModuleNotFoundError(
                f"tune needs {library}, which is not installed: pip install -c constraints.txt -e '.[tune]'"
            )
    if given.show is not None:
        _show(given)
        return
    _check(given)
    from lightning_pmss.search.space import read_space
    from lightning_pmss.search.storage import open_storage, said_if_away

    space = read_space(given.space)
    name = given.study or (Path(given.config[0]).stem if given.config else "search")
    _check_name(name)
    output = _output(given, name)
    output.mkdir(parents=True, exist_ok=True)
    url = given.storage or _sqlite(output)
    storage = open_storage(url)  # a database that cannot be reached shows before anything else is loaded

    from lightning_pmss.cli.recipe import Recipe
    from lightning_pmss.runs.process import STOPPING
    from lightning_pmss.search.search import Plan, Search
    from lightning_pmss.search.trial import ProcessRunner
    from lightning_pmss.search.workers import Worker

    words = [word for file in given.config or () for word in ("--config", file)]
    recipe = Recipe([*words, *rest])
    _check_seed("seed_everything", recipe.data.get("seed_everything"))
    for line in _warnings(recipe, space, given):
        print(f"warning: {line}", file=sys.stderr, flush=True)
    shared = ("trials", "fraction", "finish", "monitor", "mode", "sampler", "seed")
    plan = Plan(name, output, space, recipe.data, **{option: getattr(given, option) for option in shared})
    launcher = shlex.split(given.launcher) if given.launcher else [sys.executable]
    runner = ProcessRunner(launcher, partial(_say, STOPPING))
    worker = Worker(output / "workers")
    try:
        search = Search(plan, storage, url, partial(recipe.refuse_wrong, what=given.space), runner, _say, worker)
        _write_yaml(output / "space.yaml", space.text, "What the search varies; the recipe is in recipe.yaml.")
        _write_yaml(output / "recipe.yaml", recipe.data, "The recipe of the search, without the settings of a trial.")
        with said_if_away(), _stoppable():
            search.search()
            search.finish()
    finally:
        worker.close()
    _tell(search, recipe)


def _check(given: argparse.Namespace) -> None:
    """Refuse options that no search can have.

    Raises:
        ValueError: There is one.
    """
    if given.space is None:
        raise ValueError("--space is missing: what shall vary? configs/tune/default.yaml is an example.")
    if given.trials < 1:
        raise ValueError(f"--trials {given.trials}: give a number of trials, at least 1.")
    if not 0 < given.fraction <= 1:
        raise ValueError(f"--fraction {given.fraction:g} is a share of the training; type a number above 0, at most 1.")
    if given.finish < 0:
        raise ValueError(f"--finish {given.finish}: give a number of trials, 0 for none.")
    _check_seed("seed", given.seed)


def _check_seed(option: str, seed: Any) -> None:
    if isinstance(seed, int) and not 0 <= seed < 2**32:
        raise ValueError(f"--{option} {seed}: give a number from 0 to {2**32 - 1}.")


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
        raise ValueError(f"--study {name!r}: a name has letters, digits, and the signs _ - . alone.")


def _output(given: argparse.Namespace, name: str) -> Path:
    return Path(given.output).expanduser() if given.output else Path("runs", "tune", name)


def _sqlite(output: Path) -> str:
    return f"sqlite:///{(output / 'study.db').absolute()}"


def _say(line: str) -> None:
    print(line, flush=True)


def _warnings(recipe: Recipe, space: Space, given: argparse.Namespace) -> Iterator[str]:
    """Check the space by the parser of fit; yield what is odd about it.

    Raises:
        ValueError: An option does not exist or does not take a value.
    """
    from lightning_pmss.search.config import warm_up

    longest = 0.0
    for what, settings in space.examples():
        longest = max(longest, warm_up(recipe.refuse_wrong(settings, f"{given.space}: {what}")))
    if longest > given.fraction:
        yield (
            f"--fraction {given.fraction:g} ends inside of the warm-up (model.warmup_ratio up to {longest:g}), so trials are"
            " compared before they have trained at their learning rate."
        )


@contextmanager
def _stoppable() -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM into an end after which the search can be continued."""

    class _Terminated(KeyboardInterrupt):
        """By SIGTERM."""

    def terminate(number: int, frame: Any) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except KeyboardInterrupt as error:
        print("stopped; the same command continues the search", file=sys.stderr, flush=True)
        raise SystemExit(128 + (signal.SIGTERM if isinstance(error, _Terminated) else signal.SIGINT)) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _write_yaml(path: Path, content: Any, head: str) -> None:
    with atomic_file(path) as new:
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        new.write_text("".join(f"# {line}\n" for line in head.splitlines()) + f"\n{text}", encoding="utf-8")


def _tell(search: Search, recipe: Recipe) -> None:
    """Print the table and the ranks, write page and winner."""
    from lightning_pmss.search.page import write_page
    from lightning_pmss.search.ranks import ranks
    from lightning_pmss.search.records import settings_text, winner
    from lightning_pmss.search.table import table

    plan, trials = search.plan, search.lines()
    print(f"\n{table(trials, plan.space, plan.mode)}\n")
    if plan.fraction < 1:
        print(f"{ranks(trials, plan.mode).text()}\n")
    best = winner(trials, plan.mode)
    if best is None:
        raise ValueError(f"no trial of the study {plan.name!r} has a score; {plan.output / 'trials'} has their output.")
    score, when = (best.final, "at the end") if best.final is not None else (best.early, "at the fraction")
    said = f"{plan.monitor} {score:.6g} {when}; {settings_text(plan.space, best.params)}"
    file = plan.output / "best.yaml"
    head = f"The best trial of the study {plan.name}: trial {best.number}, {said}"
    head += f"\nLaunch: python -m lightning_pmss fit --config {file}"
    _write_yaml(file, recipe.compose(plan.space.settings(best.params)), head)
    page = write_page(plan.output / "report.html", plan.name, trials, plan.space, plan.bound(), search.untrained)
    print(f"best: trial {best.number}, {said}\nits recipe: {file}\npage: {page}")


def _show(given: argparse.Namespace) -> None:
    """Print the table of a study.

    Raises:
        FileNotFoundError: There is no such database.
        ValueError: It cannot be used, or does not have the study.
    """
    from lightning_pmss.search.ranks import ranks
    from lightning_pmss.search.search import read_search
    from lightning_pmss.search.storage import database_file
    from lightning_pmss.search.table import table

    _check_name(given.show)
    url = given.storage or _sqlite(_output(given, given.show))
    file = database_file(url)
    if file is not None and not file.is_file():
        raise FileNotFoundError(
            f"There is no database {file}. Type the --storage or the --output of the search, as it was typed then."
        )
    trials, space, bound = read_search(url, given.show)
    print(table(trials, space, bound["mode"]))
    if bound["fraction"] < 1:
        print(f"\n{ranks(trials, bound['mode']).text()}")
