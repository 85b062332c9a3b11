"""Lightning's ``fit``, ``validate``, ``test`` and ``predict`` with PMSS."""

from __future__ import annotations

import difflib
import re
import sys
from dataclasses import fields, replace
from typing import Any, NoReturn

import lightning as L
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.rank_zero import rank_zero_info

# Imported so that their classes can be named without their module: `--data GSM8KDataModule`.
import lightning_pmss.datamodules
import lightning_pmss.metrics
import lightning_pmss.modules  # noqa: F401
from lightning_pmss.callbacks.adapter import AdapterCallback
from lightning_pmss.callbacks.loss_curve import LossCurve  # noqa: F401
from lightning_pmss.callbacks.pmss import PMSSCallback
from lightning_pmss.checkpoints.contents import read_description
from lightning_pmss.checkpoints.plugin import local_path
from lightning_pmss.cli.config_files import check_classes, check_file, deny_imports, given_files
from lightning_pmss.cli.debugging import debugging
from lightning_pmss.cli.errors import refuse, refusing
from lightning_pmss.cli.tools import PROGRAM, TOOLS
from lightning_pmss.methods import METHODS, method_of  # noqa: F401  so that their configurations can be named
from lightning_pmss.methods.config import AdapterConfig
from lightning_pmss.methods.pmss.config import PMSSConfig
from lightning_pmss.version import __version__


class PMSSParser(LightningArgumentParser):
    """Says what is wrong in a few lines, without the seventy lines of all options."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with a message and code 2; jsonargparse calls it for all that it cannot parse."""
        if not self.exit_on_error or debugging():
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        program = parser.prog.replace(" [options]", "")
        unknown = re.search(r"(?:unrecognized arguments:|does not accept option) '?-*([\w.]+)", message)
        known = [word.lstrip("-") for word in parser._option_string_actions]
        close = difflib.get_close_matches(unknown[1], known, n=1) if unknown else []
        said = without_noise(message) + (f". Did you mean --{close[0]}?" if close else "")
        if inside := re.search(
            r"Option '(\w+)' is not accepted.*class_path='lightning_pmss\.optimizers\.(\w+)'", message
        ):
            name, kind = inside.groups()
            said += f"\n{kind} wraps an optimizer, which has such options: --model.optimizer.base_optimizer.{name}"
        refuse(program, said, help_of=program)


# What jsonargparse adds to an error that says nothing more to the reader.
_NOISE = ("Subtypes: ", "Given value", "- Expected a <class 'NoneType'>")


def without_noise(message: str) -> str:
    """An error of jsonargparse without the lines that say nothing more to the reader, and with shorter ones."""
    lines = [line for line in message.splitlines() if not line.strip().startswith(_NOISE)]
    return "\n".join(line[:400] for line in lines)


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
        debugging()  # before jsonargparse reads the variable
        deny_imports()
        set_parsing_settings(
            subclasses_enabled=[AdapterConfig]
        )  # else jsonargparse takes a dataclass for one fixed class
        words = (sys.argv[1:] if args is None else args) if run else []
        self._words = words if isinstance(words, list) else []
        command = next((word for word in self._words if word in self.subcommands()), "")
        with refusing(f"{PROGRAM} {command}".strip()):
            super().__init__(
                subclass_mode_model=True,
                subclass_mode_data=True,
                # Lightning would make the optimizer before the callback converts the model: U would never be trained.
                auto_configure_optimizers=False,
                parser_class=PMSSParser,
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
        """Add ``--pmss.*`` and ``--adapter.*``, and let the tokenizer follow the model."""
        parser.add_lightning_class_args(PMSSCallback, "pmss")
        parser.add_subclass_arguments(
            AdapterConfig,
            "adapter",
            required=False,
            help="Another method in the place of PMSS, such as LoRAConfig. Of --pmss.* it takes output_dir and the like, and"
            " which layers are meant where --adapter.* does not say it.",
        )
        parser.link_arguments("model.init_args.model_name_or_path", "data.init_args.tokenizer")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse; configuration files that are none are refused by name, before their content is."""
        chosen = next((word for word in self._words if word in self.subcommands()), None)
        if chosen is not None:
            actions = self._subcommand_parsers[chosen]._actions
            known = dict.fromkeys(action.dest.partition(".")[0] for action in actions)
            for file in given_files(self._words[self._words.index(chosen) :]):
                check_file(file, [name for name in known if name not in ("help", "config", "print_config")])
        super().parse_arguments(parser, args)

    def _parse_ckpt_path(self) -> None:
        """Lightning's, which reads the checkpoint: first refuse one that cannot be used, before any long work."""
        given = self.config[self.config.subcommand].get("ckpt_path") if self.config.get("subcommand") else None
        path = None if given in (None, "best", "last", "hpc") else local_path(given)
        if path is not None and not str(given).startswith("registry"):
            if not path.exists():
                raise FileNotFoundError(f"the checkpoint {path} does not exist.")
            read_description(path, f"the checkpoint {path}")
        super()._parse_ckpt_path()

    def before_instantiate_classes(self) -> None:
        """Nothing of the wrong kind is called."""
        check_classes(self.config)

    def instantiate_classes(self) -> None:
        """Make Trainer, model and data."""
        super().instantiate_classes()
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            config = getattr(callback, "config", None)
            if isinstance(config, AdapterConfig):
                method_of(config).read_given()  # a damaged skeleton file shows before the model is loaded

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Make the Trainer; whatever Lightning raises there is about the options."""
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (TypeError, RuntimeError) as error:
            raise ValueError(str(error)) from error
        if (chosen := self._get(self.config_init, "adapter")) is not None:
            trainer.callbacks = [_with_method(c, chosen) for c in trainer.callbacks]  # type: ignore[attr-defined]
        if trainer.accumulate_grad_batches < 1:
            raise ValueError(
                f"accumulate_grad_batches={trainer.accumulate_grad_batches} must be at least 1, a batch per step."
            )
        return trainer


class DataCLI(PMSSCLI):
    """Parses the options of ``fit`` and makes the data module alone: no model, no Trainer, no training.

    ``datamodule`` is the data module, null without ``--data``; ``trainer_options`` are the Trainer's arguments, and ``recipe``
    is the whole configuration as text.
    """

    datamodule: L.LightningDataModule | None
    trainer_options: Namespace
    recipe: str

    def instantiate_classes(self) -> None:
        """Make the data module."""
        self.trainer_options = self._get(self.config, "trainer")
        parser: ArgumentParser = self._subcommand_parsers["fit"]
        self.recipe = parser.dump(self.config["fit"], skip_none=False)
        given = self._get(self.config, "data")
        parser = ArgumentParser()
        parser.add_subclass_arguments(L.LightningDataModule, "data", required=False)
        self.datamodule = None if given is None else parser.instantiate(Namespace(data=given)).data

    def _set_seed(self) -> None:
        """Nothing random is done."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing is run."""


# Which layers are meant, whatever the method.
_SHARED = ("target_modules", "exclude_modules", "target_parameters", "also_train", "root")


def _with_method(callback: L.Callback, config: AdapterConfig) -> L.Callback:
    """The callback of ``--pmss.*`` with another method; others as they are."""
    if not isinstance(callback, PMSSCallback):
        return callback
    default, own = PMSSConfig(), callback.config
    if unused := [
        f.name for f in fields(own) if f.name not in _SHARED and getattr(own, f.name) != getattr(default, f.name)
    ]:
        rank_zero_info(
            f"{config.label()} takes the place of PMSS: {', '.join(f'--pmss.{n}' for n in unused)} are not used."
        )
    usual, meant = type(config)(), {}
    for name in _SHARED:
        if getattr(config, name) == getattr(usual, name):
            meant[name] = getattr(callback.config, name)
    return AdapterCallback(
        replace(config, **meant),
        callback.output_dir,
        callback.merge_on_save,
        callback.on_nonfinite,
        callback.log_throughput,
        callback.log_u_norm,
    )


def run(given: list[str], from_process: bool) -> PMSSCLI:
    """Run one of Lightning's commands.

    Args:
        given: The command line without the program's name.
        from_process: Whether it is the process's own.

    Raises:
        SystemExit: With code 2, after a message on stderr, if what was typed cannot be done.
    """
    commands = [*PMSSCLI.subcommands(), *TOOLS]
    if not given or not given[0].startswith("-") and given[0] not in commands:
        close = difflib.get_close_matches(given[0], commands, n=1) if given else []
        what = f"there is no command {given[0]!r}" if given else "no command was given"
        hint = f"; did you mean {close[0]}?" if close else "."
        refuse(PROGRAM, f"{what}{hint}\nThe commands are {', '.join(commands)}.", help_of=PROGRAM)
    # None, not a copy: Lightning warns about a list given beside the process's own arguments.
    return PMSSCLI(args=None if from_process else given)
