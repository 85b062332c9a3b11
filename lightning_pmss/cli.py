"""The command line: Lightning's ``fit``, ``validate``, ``test`` and ``predict`` with PMSS, and tools beside them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

# Imported so that their classes can be named without their module: `--data GSM8KDataModule`.
import lightning_pmss.datamodules
import lightning_pmss.metrics
import lightning_pmss.modules  # noqa: F401
from lightning_pmss.callbacks.loss_curve import LossCurve  # noqa: F401
from lightning_pmss.callbacks.pmss import PMSSCallback
from lightning_pmss.version import __version__

PROGRAM = "python -m lightning_pmss"


class PMSSCLI(LightningCLI):
    """LightningCLI whose Trainer always has a `PMSSCallback`, set by ``--pmss.*``.

    Model and data are given by class (``--model CausalLMModule`` or any LightningModule of yours). Where both have the
    argument, the data's ``tokenizer`` follows the model's ``model_name_or_path``.

    Args:
        args: Command line as a list; by default that of the process.
        run: Whether to parse a subcommand and run it; if not, only Trainer, model and data are made.
    """

    def __init__(self, args: ArgsType = None, run: bool = True) -> None:
        tools = "; ".join(f"{name}: {summary}" for name, (_, summary) in TOOLS.items())
        super().__init__(
            subclass_mode_model=True,
            subclass_mode_data=True,
            # Lightning would make the optimizer before the callback converts the model: U would never be trained.
            auto_configure_optimizers=False,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={
                "prog": PROGRAM,
                "description": "PMSS fine-tuning with PyTorch Lightning.",
                "epilog": f"Tools beside these, each with its own --help: {tools}.",
                "version": __version__,
            },
            args=args,
            run=run,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``--pmss.*`` and let the tokenizer follow the model."""
        parser.add_lightning_class_args(PMSSCallback, "pmss")
        parser.link_arguments("model.init_args.model_name_or_path", "data.init_args.tokenizer")

    def instantiate_classes(self) -> None:
        """Make Trainer, model and data; what their constructors refuse is an error of the command line, not a crash."""
        try:
            super().instantiate_classes()
        except (OSError, ValueError) as error:
            self.parser.error(str(error), error)  # JSONARGPARSE_DEBUG=1 shows the traceback


# -- tools ---------------------------------------------------------------------------------------------------------
# A tool takes its part of the command line. It says what is wrong by ValueError or OSError: one line, exit code 2.


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


def main(args: Sequence[str] | None = None) -> Any:
    """Run one command.

    Args:
        args: Command line without the program's name; by default that of the process.

    Raises:
        SystemExit: With code 2, after one line on stderr, if a tool refuses what it was given.
    """
    given = list(sys.argv[1:] if args is None else args)
    if not given or given[0] not in TOOLS:
        # None, not a copy: Lightning warns about a list given beside the process's own arguments.
        return PMSSCLI(args=None if args is None else given)
    name, *rest = given
    try:
        return TOOLS[name][0](rest)
    except (OSError, ValueError) as error:
        print(f"{PROGRAM} {name}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
