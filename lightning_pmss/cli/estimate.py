"""``python -m lightning_pmss estimate``: options, output and files."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from lightning_pmss.cli.options import Options, refuse_others
from lightning_pmss.estimate.run import Run, ZeroSettings
from lightning_pmss.methods.config import AdapterConfig
from lightning_pmss.methods.pmss.config import PMSSConfig
from lightning_pmss.store import read_json
from lightning_pmss.store.disk import atomic_file

EPILOG = "Only config.json is read. What is counted and what is not: docs/estimate.md."


RUN = Options(Run, [option.name for option in fields(Run) if option.name not in ("config", "zero")])
CONVERSION = Options(
    PMSSConfig,
    (
        "target_modules",
        "exclude_modules",
        "target_parameters",
        "rank",
        "rank_pattern",
        "columns",
        "coordinates",
        "memory",
    ),  # fmt: skip
)
ZERO = Options(ZeroSettings, ("bucket",))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The tool's options."""
    parser.epilog = EPILOG
    for options in (RUN, CONVERSION, ZERO):
        options.add_to(parser)
    parser.add_argument(
        "--method",
        default=PMSSConfig.method,
        metavar="NAME",
        help="The method, such as lora, miss or lora_xs (default: %(default)s). Defaults of the rank and the like are PMSS's;"
        " the others have those of their configurations.",
    )
    parser.add_argument("--gpu", type=_bytes, metavar="SIZE", help="Memory of one device, such as 80GB: does it fit?")
    parser.add_argument("--json", action="store_true", help="Print JSON, sizes in bytes.")
    parser.add_argument("--output", metavar="FILE", help="Write the JSON there too.")


def run(parser: argparse.ArgumentParser, args: Sequence[str]) -> None:
    """Parse, estimate, print.

    Raises:
        ValueError: Options that do not fit one another or the model.
        OSError: The configuration cannot be read or the output not be written.
    """
    add_arguments(parser)
    given = parser.parse_args(args)
    if given.output is not None and not (folder := Path(given.output).expanduser().absolute().parent).is_dir():
        raise FileNotFoundError(f"--output {given.output}: the folder {folder} does not exist; make it first.")
    if given.output is not None:
        _refuse_others(Path(given.output).expanduser())

    from lightning_pmss.estimate.advice import remedies
    from lightning_pmss.estimate.memory import estimate
    from lightning_pmss.estimate.table import table

    options = vars(given)
    config, zero = _config(given.method, CONVERSION.take(options)), ZeroSettings(**ZERO.take(options))
    asked = Run(**RUN.take(options), config=config, zero=zero)
    result = estimate(asked)
    found = None
    if given.gpu is not None and result.methods[given.method].total > given.gpu:
        found = remedies(asked, given.gpu)
    record: dict[str, Any] = result.to_dict()
    if given.gpu is not None:
        record["gpu"] = given.gpu
        record["fits"] = {name: method.total <= given.gpu for name, method in result.methods.items()}
        record["remedies"] = [vars(remedy) for remedy in found or ()]
    text = json.dumps(record, indent=2)
    if given.output is not None:
        with atomic_file(given.output) as new:
            new.write_bytes(f"{text}\n".encode())
    print(text if given.json else table(result, given.gpu, found))


def _config(method: str, options: dict[str, Any]) -> AdapterConfig:
    from lightning_pmss.methods import METHODS

    if method not in METHODS:
        raise ValueError(f"--method {method} is not known; type one of {', '.join(METHODS)}.")
    config = METHODS[method].config_class
    refuse_others(method, options, {field.name for field in fields(config)})
    found: AdapterConfig = config(**options)
    return found


def _refuse_others(output: Path) -> None:
    """An earlier estimate may be replaced, and nothing else."""
    if not output.exists():
        return
    try:
        ours = read_json(output, "").keys() >= {"run", "methods", "parameters"}
    except (AttributeError, OSError, ValueError):
        ours = False
    if not ours:
        raise FileExistsError(f"{output} is no estimate, and writing there would destroy it. Name another file.")


def _bytes(text: str) -> float:
    """``80``, ``80GB`` and ``80 gb`` are 80 * 10^9 bytes: cards have up to 7 % more, which stays head room."""
    number = text.strip().lower().removesuffix("gb").removesuffix("g").strip()
    try:
        size = float(number)
    except ValueError:
        size = 0.0
    if not 0 < size < 10_000:
        raise argparse.ArgumentTypeError(f"{text!r} is no size in GB; type 24GB or 80")
    return size * 1e9
