"""Checks of what comes from configuration files, before anything is made of it."""

from __future__ import annotations

import difflib
import inspect
import pkgutil
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from jsonargparse import set_parsing_settings as _set_parsing_settings

from lightning_pmss.store import read_yaml

PACKAGE = "lightning_pmss"


def given_files(args: Sequence[str]) -> list[Path]:
    """The local configuration files that a command line names."""
    found = [word.partition("=")[2] for word in args if word.startswith("--config=")]
    found += [after for word, after in zip(args, args[1:], strict=False) if word in ("-c", "--config")]
    return [path for path in map(Path, found) if path.is_file()]


def check_file(file: Path, known: Sequence[str]) -> None:
    """Refuse a file that is no configuration.

    Args:
        file: In YAML or JSON.
        known: The keys that it may have at its top.

    Raises:
        ValueError: With the file, the place in it, and what it should be.
    """
    content = read_yaml(file, "configuration", "It is neither YAML nor JSON as it stands.")
    if not isinstance(content, Mapping):
        what = "is empty" if content is None else f"holds {type(content).__name__} `{str(content)[:40]}`"
        raise ValueError(f"{file} {what}; a configuration holds `key: value` lines with {', '.join(known)}.")
    if unknown := [str(key) for key in content if key not in known]:
        close = difflib.get_close_matches(unknown[0], known, n=1)
        remedy = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}."
        raise ValueError(f"{file}: {unknown[0]!r} is not known at the top of a configuration; {remedy}")


def deny_imports() -> None:
    """Let configurations name no class or function of modules that run commands or code, such as ``os``.

    They are refused before they are imported; jsonargparse has the list, and by itself only warns.
    """
    _set_parsing_settings(import_path_denylist=[])


def check_classes(config: Any) -> None:
    """Refuse a value of an argument of ours that is no class of the kind which the argument takes.

    jsonargparse calls whatever a configuration names for an argument such as ``optimizer: Callable[..., Optimizer]``, also a
    function that returns something else. Here it must be a subclass of ``Optimizer``, and so must all that is named inside it.

    Args:
        config: Parsed, and not instantiated.

    Raises:
        ValueError: It is not.
    """
    for spec in _specs(config):
        kind = pkgutil.resolve_name(spec["class_path"])
        values = spec.get("init_args") or {}
        for name, allowed in _arguments(kind).items():
            value = values.get(name)
            found = [pkgutil.resolve_name(inner["class_path"]) for inner in _specs(value)]
            for given in [value] if callable(value) else found:
                if not (inspect.isclass(given) and issubclass(given, allowed)):
                    raise ValueError(
                        f"{name} of {kind.__name__}: {_path(given)} is no subclass of {' or '.join(map(_path, allowed))},"
                        " and was not called."
                    )


def _path(thing: Any) -> str:
    return f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', thing)}"


def _specs(value: Any) -> Iterator[Any]:
    """All ``{class_path, init_args}`` in a configuration."""
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        if isinstance(value.get("class_path"), str):
            yield value
        for inner in value.values():
            yield from _specs(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _specs(inner)


def _arguments(kind: Any) -> dict[str, tuple[type, ...]]:
    """Arguments of this library that the class takes which are classes, or make instances of them -> these classes."""
    found: dict[str, tuple[type, ...]] = {}
    for base in inspect.getmro(kind) if inspect.isclass(kind) else ():
        if base.__module__.partition(".")[0] == PACKAGE and "__init__" in vars(base):
            hints = typing.get_type_hints(base.__init__)  # type: ignore[misc]
            for name, hint in hints.items():
                if classes := tuple(_classes(hint)):
                    found.setdefault(name, classes)
    return found


def _classes(hint: Any) -> Iterator[type]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Callable or origin is type:
        yield from _classes(arguments[-1])
    elif origin is not None:
        for argument in arguments:
            yield from _classes(argument)
    elif inspect.isclass(hint) and hint.__module__ not in ("builtins", "pathlib", "typing"):
        yield hint
