"""``python -m lightning_pmss estimate``: options, output and files."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_pmss.cli.words import patterns, rank_entry
from lightning_pmss.estimate.run import (
    OPTIMIZERS,
    PRECISIONS,
    QUANTISATIONS,
    STRATEGIES,
    WEIGHTS_DTYPES,
    Run,
    ZeroSettings,
)
from lightning_pmss.methods.pmss.config import COORDINATES, MEMORY_MODES, PMSSConfig
from lightning_pmss.store import read_json
from lightning_pmss.store.disk import atomic_file

EPILOG = "Only config.json is read. What is counted and what is not: docs/estimate.md."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The tool's options."""
    parser.epilog = EPILOG
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="folder with config.json, or such a file")
    add("--strategy", choices=STRATEGIES, help="default: single on one device, fsdp2 (quantised: ddp) on several")
    add("--devices", type=int, default=1, help="devices per node (default: 1)")
    add("--nodes", type=int, default=1, help="default: 1")
    add("--rank", type=int, default=256, help="default: 256")
    add("--rank-pattern", nargs="+", default=[], metavar="NAME=RANK", help="rank of some modules, as v_proj=128")
    names = "'all-linear', names (endings) of modules, or one regular expression"
    add("--target-modules", nargs="+", default=["all-linear"], metavar="NAME", help=f"{names} (default: all-linear)")
    add("--exclude-modules", nargs="+", default=[], metavar="NAME", help="modules left out, with all below them")
    add("--coordinates", choices=COORDINATES, default="orthonormal", help="default: orthonormal")
    add("--memory", choices=MEMORY_MODES, default="regather", help="default: regather")
    add("--quantisation", choices=QUANTISATIONS, help="linear layers in 4-bit codes of bitsandbytes (default: no)")
    add("--micro-batch", type=int, default=1, help="sequences per device and pass (default: 1)")
    add("--sequence-length", type=int, default=2048, help="tokens of the longest sequence (default: 2048)")
    add("--precision", choices=PRECISIONS, default="bf16-true", help="default: bf16-true")
    add("--weights-dtype", choices=WEIGHTS_DTYPES, default="auto", help="default: the config's")
    add(
        "--gradient-checkpointing",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="recompute decoder layers (default: no)",
    )
    add("--optimizer", choices=tuple(OPTIMIZERS), default="adamw", help="default: adamw")
    bucket = ZeroSettings().bucket
    add("--bucket", type=int, default=bucket, metavar="N", help=f"DeepSpeed's reduce_bucket_size (default: {bucket})")
    add("--gpu", type=_bytes, metavar="SIZE", help="memory of one device, such as 80GB: does it fit?")
    add("--json", action="store_true", help="print JSON, sizes in bytes")
    add("--output", metavar="FILE", help="write the JSON there too")


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

    config = PMSSConfig(
        target_modules=patterns(given.target_modules),
        exclude_modules=patterns(given.exclude_modules) if given.exclude_modules else (),
        rank=given.rank,
        rank_pattern=dict(rank_entry(entry) for entry in given.rank_pattern),
        coordinates=given.coordinates,
        memory=given.memory,
    )
    several = given.devices * given.nodes > 1
    asked = Run(
        model=given.model,
        strategy=given.strategy or (("ddp" if given.quantisation else "fsdp2") if several else "single"),
        devices=given.devices,
        nodes=given.nodes,
        config=config,
        micro_batch=given.micro_batch,
        sequence_length=given.sequence_length,
        precision=given.precision,
        weights_dtype=given.weights_dtype,
        gradient_checkpointing=given.gradient_checkpointing,
        optimizer=given.optimizer,
        zero=ZeroSettings(bucket=given.bucket),
        quantisation=given.quantisation,
    )
    result = estimate(asked)
    found = None
    if given.gpu is not None and result.methods["pmss"].total > given.gpu:
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
