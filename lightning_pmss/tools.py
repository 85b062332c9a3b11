"""The tools beside Lightning's commands, ``python -m lightning_pmss merge ...``, each with a parser of its own.

A tool takes its part of the command line. It says what is wrong by ValueError or OSError, which `cli.main` turns into one
line and exit code 2. Each imports what it needs when it is called, so that ``--help`` is quick.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

PROGRAM = "python -m lightning_pmss"


def _parser(name: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"{PROGRAM} {name}", description=TOOLS[name][1])


def _merge(args: Sequence[str]) -> None:
    from lightning_pmss.files.merged import merge_files

    parser = _parser("merge")
    parser.add_argument("--base", required=True, metavar="MODEL_DIR", help="folder of the base model (safetensors)")
    parser.add_argument("--adapter", required=True, metavar="ADAPTER_DIR", help="adapter folder")
    parser.add_argument("--output", required=True, metavar="MERGED_DIR", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the output folder if it exists")
    parser.add_argument("--dtype", help="dtype of the written weights, such as bfloat16 (default: the base's)")
    parser.add_argument("--max-shard-size", help="largest size of one weights file, such as 5GB (default: 5GB)")
    options = vars(parser.parse_args(args))
    chosen = {key: value for key, value in options.items() if value is not None}
    print(merge_files(**chosen))


TOOLS: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {
    "merge": (_merge, "write base + adapter as a plain model folder, shard by shard"),
}
