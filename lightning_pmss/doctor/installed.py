"""Versions of the installed libraries, and extras that are incomplete."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

NAME = "lightning-pmss"
LIBRARIES = (
    "torch", "lightning", "transformers", "datasets", "safetensors", "tokenizers", "accelerate", "peft", "deepspeed",
    "bitsandbytes", "torchao", "lm_eval", "gguf", "matplotlib",
)  # fmt: skip
MALICIOUS = {"lightning": ("2.6.2", "2.6.3")}


@dataclass(frozen=True)
class Extra:
    """An extra of the package.

    Attributes:
        name: Its name.
        missing: Requirements that are not installed, or in another version.
    """

    name: str
    missing: tuple[str, ...]

    @property
    def command(self) -> str:
        """What installs it, in a clone of the repository."""
        return f"pip install -c constraints.txt -e '.[{self.name}]'"


def versions() -> dict[str, str | None]:
    """Return the version of Python, of this package and of the libraries it works with; None: not installed."""
    return {"python": platform.python_version(), **{name: installed(name) for name in (NAME, *LIBRARIES)}}


def installed(name: str) -> str | None:
    """Return a library's version, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def malicious() -> list[str]:
    """Return the installed libraries of which this release was malicious."""
    return [f"{name} {installed(name)}" for name, bad in MALICIOUS.items() if installed(name) in bad]


def extras() -> list[Extra]:
    """Return the package's extras; none if it was not installed by pip."""
    try:
        declared = [Requirement(text) for text in requires(NAME) or ()]
    except PackageNotFoundError:
        return []
    optional = [r for r in declared if r.marker is not None and "extra" in str(r.marker)]
    names = sorted({word for r in optional for word in _named(str(r.marker))})
    return [Extra(name, tuple(sorted(_missing(name, optional, set())))) for name in names]


def _named(marker: str) -> list[str]:
    """The extras that a marker such as ``extra == "docs"`` names."""
    return [part.split('"')[1] for part in marker.split("extra == ")[1:]]


def _missing(extra: str, optional: list[Requirement], seen: set[str]) -> set[str]:
    """Unmet requirements of an extra, also through other extras of this package."""
    found: set[str] = set()
    for requirement in optional:
        assert requirement.marker is not None
        if not requirement.marker.evaluate({"extra": extra}):
            continue
        if requirement.name == NAME:
            for inner in requirement.extras - seen:
                found |= _missing(inner, optional, seen | {extra, inner})
        elif not requirement.specifier.contains(installed(requirement.name) or "", prereleases=True):
            found.add(f"{requirement.name}{requirement.specifier}")
    return found
