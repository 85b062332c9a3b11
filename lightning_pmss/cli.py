"""The command line: Lightning's ``fit``, ``validate``, ``test`` and ``predict`` with PMSS, and tools beside them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

# Imported so that their classes can be named without their module: `--data GSM8KDataModule`.
import lightning_pmss.datamodules
import lightning_pmss.metrics
import lightning_pmss.modules  # noqa: F401
from lightning_pmss.callbacks.loss_curve import LossCurve  # noqa: F401
from lightning_pmss.callbacks.pmss import PMSSCallback
from lightning_pmss.checkpoint_io import local_path
from lightning_pmss.checkpointing import read_description
from lightning_pmss.skeleton import read_skeleton
from lightning_pmss.tools import PROGRAM, TOOLS
from lightning_pmss.version import __version__


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

    def _parse_ckpt_path(self) -> None:
        """Lightning's, which reads the checkpoint: first refuse one that cannot be used, before any long work."""
        given = self.config[self.config.subcommand].get("ckpt_path") if self.config.get("subcommand") else None
        path = None if given in (None, "best", "last", "hpc") else local_path(given)
        if path is not None and not str(given).startswith("registry"):
            try:
                if not path.exists():
                    raise FileNotFoundError(f"the checkpoint {path} does not exist.")
                read_description(path, f"the checkpoint {path}")
            except (OSError, ValueError) as error:
                self.parser.error(str(error), error)
        super()._parse_ckpt_path()

    def instantiate_classes(self) -> None:
        """Make Trainer, model and data; what their constructors refuse is an error of the command line, not a crash."""
        try:
            super().instantiate_classes()
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, PMSSCallback) and callback.config.skeleton_file is not None:
                    read_skeleton(callback.config.skeleton_file)  # a damaged one shows before the model is loaded
        except (OSError, ValueError) as error:
            self.parser.error(str(error), error)  # JSONARGPARSE_DEBUG=1 shows the traceback


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
    except (OSError, ValueError, ModuleNotFoundError) as error:
        print(f"{PROGRAM} {name}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
