"""A recipe as plain data, with options typed on top, checked by the parser of ``fit``; nothing is made or run."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from jsonargparse import ArgumentError, Namespace

from lightning_pmss.cli.lightning import DataCLI, without_noise
from lightning_pmss.search.space import Settings, arguments


class _ParsingCLI(DataCLI):
    """Parses the options of ``fit``, and makes nothing."""

    def instantiate_classes(self) -> None:
        """Nothing is made."""


class Recipe:
    """What was typed behind ``fit``: read once, so that a file which is edited later changes no trial.

    Args:
        words: Options of ``fit``.

    Raises:
        SystemExit: With code 2, after a message, if ``fit`` would refuse them.
        ValueError: They resume a checkpoint.
    """

    def __init__(self, words: Sequence[str]) -> None:
        with warnings.catch_warnings():  # Lightning's, about options that are not those of the process
            warnings.filterwarnings("ignore", "LightningCLI's args parameter is intended")
            cli = _ParsingCLI(["fit", *words])
        self._parser = cli._subcommand_parsers["fit"]
        self._parser.exit_on_error = False
        parsed = cli.config["fit"]
        if parsed.get("ckpt_path") is not None:
            raise ValueError("--ckpt_path: a search begins each trial at the base model. Leave the option out.")
        self._text = self._dump(parsed)
        self.data: dict[str, Any] = yaml.safe_load(self._text)

    def compose(self, settings: Settings) -> dict[str, Any]:
        """Return the whole configuration with settings on top.

        Raises:
            ArgumentError: The parser refuses a setting.
        """
        parsed = self._parser.parse_args(["--config", self._text, *arguments(settings)])
        found: dict[str, Any] = yaml.safe_load(self._dump(parsed))
        return found

    def refuse_wrong(self, settings: Settings, what: str) -> dict[str, Any]:
        """Return the whole configuration, or say which setting the parser refuses.

        Args:
            settings: Option -> value.
            what: Beginning of the message.

        Raises:
            ValueError: An option does not exist, with the nearest names, or does not take its value.
        """
        try:
            return self.compose(settings)
        except ArgumentError:
            accepted: Settings = {}
            for option, value in settings.items():
                try:
                    self.compose(accepted | {option: value})
                except ArgumentError as error:
                    raise ValueError(f"{what}: {self._reason(accepted, option, value, str(error))}") from error
                accepted[option] = value
            raise

    def _reason(self, accepted: Settings, option: str, value: Any, message: str) -> str:
        if not any(word in message for word in ("is not accepted", "unrecognized arguments")):
            said = " ".join(without_noise(message).split())
            return f"{option} does not take {value!r}: {said}"
        known = sorted({_short(path) for path in _paths(self.compose(accepted))})
        close = difflib.get_close_matches(_short(option), known, n=3)
        hint = f"Did you mean {' or '.join(close)}?" if close else "fit --print_config shows all options."
        return f"{option} is no option of fit with this recipe. {hint}"

    def _dump(self, parsed: Namespace) -> str:
        text: str = self._parser.dump(parsed, skip_unset=False)
        return text


def _paths(data: Any, path: str = "") -> Iterator[str]:
    """Yield the dotted names of all entries."""
    if isinstance(data, Mapping):
        for key, value in data.items():
            inner = f"{path}.{key}" if path else str(key)
            yield inner
            yield from _paths(value, inner)


def _short(path: str) -> str:
    return path.replace(".init_args", "").removesuffix(".class_path")
