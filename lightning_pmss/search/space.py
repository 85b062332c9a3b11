"""The file of a search space: which options of ``fit`` vary, between which values, and which belong to one method alone."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lightning_pmss.store import read_yaml, refuse_unreadable

_FORMS = "{low: 1.0e-4, high: 1.0e-2, log: true}, {low: 4, high: 64, int: true} or {choice: [a, b]}"
METHOD = "method"
"""The parameter that says which entry of ``methods`` a trial has."""

# A trial sets these for itself; `tune` refuses them.
_OWN = (
    "ckpt_path",
    "config",
    "pmss.merge_on_save",
    "pmss.output_dir",
    "print_config",
    "trainer.callbacks",
    "trainer.default_root_dir",
    "trainer.enable_checkpointing",
    "trainer.logger",
    "trainer.num_sanity_val_steps",
)

Settings = dict[str, Any]
"""Option as it is typed, without its dashes -> value."""


class Draws(Protocol):
    """A trial of Optuna, as far as it draws values."""

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None, log: bool) -> float:
        """A number of a range."""
        ...

    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int:
        """A whole number of a range."""
        ...

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        """One of several values."""
        ...


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, both included.

    Attributes:
        low: Smallest value.
        high: Largest value.
        log: Draw the logarithm uniformly.
        whole: Draw whole numbers.
        step: Distance of the values; None: of real numbers any, of whole ones 1.
    """

    low: float
    high: float
    log: bool = False
    whole: bool = False
    step: float | None = None

    def draw(self, name: str, draws: Draws) -> Any:
        """Return the value that a trial draws."""
        if self.whole:
            return draws.suggest_int(name, int(self.low), int(self.high), step=int(self.step or 1), log=self.log)
        return draws.suggest_float(name, self.low, self.high, step=self.step, log=self.log)

    def examples(self) -> list[Any]:
        """Return values that stand for all: both ends."""
        return [int(x) if self.whole else x for x in (self.low, self.high)]

    def of(self, drawn: Any) -> Any:
        """Return the value of what Optuna has recorded."""
        return drawn


@dataclass(frozen=True)
class Choice:
    """One of several values of any kind."""

    values: tuple[Any, ...]

    def draw(self, name: str, draws: Draws) -> Any:
        """Return the value that a trial draws."""
        return self.of(draws.suggest_categorical(name, self.labels()))

    def labels(self) -> list[Any]:
        """Return the values as Optuna records them: what is no scalar as JSON."""
        return [value if _is_scalar(value) else json.dumps(value) for value in self.values]

    def examples(self) -> list[Any]:
        """Return all values."""
        return list(self.values)

    def of(self, drawn: Any) -> Any:
        """Return the value of what Optuna has recorded."""
        return self.values[self.labels().index(drawn)]


@dataclass(frozen=True)
class Fixed:
    """One value for all trials (of a method)."""

    value: Any

    def examples(self) -> list[Any]:
        """Return the value."""
        return [self.value]


Entry = Range | Choice | Fixed


@dataclass(frozen=True)
class Space:
    """What a search varies.

    Attributes:
        options: Option -> its values, for all trials.
        methods: Name of a method -> its own options; a trial has one of them. Empty: the recipe's method.
        text: Content of the file, as data.
    """

    options: Mapping[str, Entry]
    methods: Mapping[str, Mapping[str, Entry]]
    text: Mapping[str, Any]

    def draw(self, draws: Draws) -> Settings:
        """Draw the settings of a trial."""
        method = self._method(lambda names: draws.suggest_categorical(METHOD, names))
        return {
            option: entry.value if isinstance(entry, Fixed) else entry.draw(name, draws)
            for name, option, entry in self._entries(method)
        }

    def settings(self, params: Mapping[str, Any]) -> Settings:
        """Return the settings that a trial has drawn, from the parameters that Optuna has recorded."""
        method = self._method(lambda names: params[METHOD])
        return {
            option: entry.value if isinstance(entry, Fixed) else entry.of(params[name])
            for name, option, entry in self._entries(method)
        }

    def examples(self) -> Iterator[tuple[str, Settings]]:
        """Yield settings in which each value that a range or choice stands on occurs, with what is tried in words."""
        for method in self.methods or [None]:
            entries = list(self._entries(method))
            first = {option: entry.examples()[0] for _, option, entry in entries}
            where = f" of method {method}" if method else ""
            yield f"the first values{where}", first
            for _, option, entry in entries:
                for value in entry.examples()[1:]:
                    yield f"{option}{where}", first | {option: value}

    def names_of(self, method: str | None) -> list[str]:
        """Return the parameters that only trials of a method have; of None, those of all trials."""
        if method is None:
            own = [name for name, entry in self.options.items() if not isinstance(entry, Fixed)]
            return [*([METHOD] if len(self.methods) > 1 else []), *own]
        return [_name(method, o) for o, entry in self.methods[method].items() if not isinstance(entry, Fixed)]

    def entry(self, name: str) -> Entry:
        """Return the values of a parameter.

        Raises:
            KeyError: There is no such parameter.
        """
        for method in [None, *self.methods]:
            for known, _, entry in self._entries(method):
                if known == name:
                    return entry
        raise KeyError(name)

    def is_log(self, name: str) -> bool:
        """Return whether a parameter is drawn on a logarithmic scale."""
        return name != METHOD and isinstance(entry := self.entry(name), Range) and entry.log

    def _method(self, choose: Any) -> str | None:
        names = list(self.methods)
        return choose(names) if len(names) > 1 else next(iter(names), None)

    def _entries(self, method: str | None) -> Iterator[tuple[str, str, Entry]]:
        """Yield (Optuna's name, option, entry) of all options of a trial with this method; fixed ones first."""
        own = {} if method is None else self.methods[method]
        # The class of the adapter must be typed before its options.
        for option, entry in sorted(own.items(), key=lambda item: not isinstance(item[1], Fixed)):
            yield _name(method, option), option, entry
        for option, entry in self.options.items():
            yield option, option, entry


def arguments(settings: Settings) -> list[str]:
    """Return settings as they are typed on a command line."""
    return [f"--{option}={_typed(value)}" for option, value in settings.items()]


def read_space(file: str | Path) -> Space:
    """Read the file of a search space.

    Args:
        file: YAML with ``options``, ``methods`` or both.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no space, or no value can be drawn from it; the message has the place and what to type.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"--space {file}: there is no such file. configs/tune/default.yaml is an example.")
    refuse_unreadable(path)
    content = read_yaml(path, "search space", "It is not YAML.")
    return space_of(content, str(path))


def space_of(content: Any, where: str) -> Space:
    """Make a space of the content of its file.

    Args:
        content: What YAML reads.
        where: The file, for messages.

    Raises:
        ValueError: See `read_space`.
    """
    known = ("options", "methods")
    if not isinstance(content, Mapping) or not content or set(content) - set(known):
        odd = [str(key) for key in content if key not in known] if isinstance(content, Mapping) else []
        said = f": {odd[0]!r} is not known" if odd else ""
        raise ValueError(
            f"{where}{said}. A search space has `options:` (option of fit: values) and perhaps `methods:` (name: its options)."
        )
    options = _options(content.get("options") or {}, f"{where}: options")
    given = content.get("methods") or {}
    if not isinstance(given, Mapping):
        raise ValueError(f"{where}: methods is no mapping. Write `NAME:` with the method's options below it.")
    methods = {str(name): _options(own, f"{where}: methods: {name}") for name, own in given.items()}
    for name, own in methods.items():
        if both := [option for option in own if _plain(option) in map(_plain, options)]:
            raise ValueError(f"{where}: {both[0]} is in options and in method {name}. Leave it out of one of them.")
    space = Space(options, methods, json.loads(json.dumps(content, default=str)))
    if not space.names_of(None) and not any(space.names_of(name) for name in methods):
        raise ValueError(f"{where}: nothing varies. Give an option several values: {_FORMS}.")
    return space


def _options(given: Any, where: str) -> dict[str, Entry]:
    if not isinstance(given, Mapping):
        raise ValueError(f"{where} is no mapping of options. Write lines such as model.optimizer.lr: {_FORMS}.")
    found: dict[str, Entry] = {}
    for key, value in given.items():
        option = str(key).removeprefix("--")
        if own := [name for name in _OWN if _plain(option) == name or option.startswith(f"{name}.")]:
            raise ValueError(f"{where}: {option} cannot vary: each trial sets {own[0]} for itself. Leave it out.")
        if _plain(option) in map(_plain, found):
            raise ValueError(f"{where}: {option} is there twice. Leave one of them out.")
        found[option] = _entry(value, f"{where}: {option}")
    return found


def _entry(value: Any, where: str) -> Entry:
    if not isinstance(value, Mapping):
        return Fixed(value)
    if set(value) == {"choice"}:
        return _choice(value["choice"], where)
    if not {"low", "high"} <= set(value) <= {"low", "high", "log", "int", "step"}:
        raise ValueError(f"{where}: {dict(value)} is no set of values. Type {_FORMS}, or one value.")
    low, high = (_number(value[end], f"{where}: {end}") for end in ("low", "high"))
    log, whole = (_switch(value.get(name, False), f"{where}: {name}") for name in ("log", "int"))
    step = None if value.get("step") is None else _number(value["step"], f"{where}: step")
    if not low < high:
        raise ValueError(f"{where}: low {low:g} is not below high {high:g}. Exchange them, or write one value.")
    if log and low <= 0:
        raise ValueError(f"{where}: log needs numbers above 0, and low is {low:g}.")
    if step is not None and (log or not 0 < step <= high - low):
        raise ValueError(f"{where}: step {step:g} must be above 0, at most high - low, and without log.")
    if whole and (odd := [x for x in (low, high, step) if x is not None and x != int(x)]):
        raise ValueError(f"{where}: {odd[0]:g} is no whole number, as int demands.")
    return Range(low, high, log, whole, step)


def _choice(values: Any, where: str) -> Choice:
    if not isinstance(values, list) or not values:
        raise ValueError(f"{where}: choice needs a list of values, such as {{choice: [4, 8, 16]}}.")
    choice = Choice(tuple(values))
    labels = choice.labels()
    if twice := [label for place, label in enumerate(labels) if label in labels[:place]]:  # 1 == True, too
        raise ValueError(f"{where}: {twice[0]!r} is twice among the choices. Leave one of them out.")
    return choice


def _number(value: Any, where: str) -> float:
    try:
        number = float(value)  # YAML reads 1e-4 as a text
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise ValueError(f"{where}: {value!r} is no finite number.")
    return number


def _switch(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{where}: {value!r} is neither true nor false.")
    return value


def _plain(option: str) -> str:
    """The option without the parts that can be left out when it is typed."""
    return option.replace(".init_args", "").removesuffix(".class_path")


def _name(method: str | None, option: str) -> str:
    return f"{method}: {option}"


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, str | bool | int | float)


def _typed(value: Any) -> str:
    if isinstance(value, str):
        return value
    return repr(value) if isinstance(value, float) else json.dumps(value)
