"""How error messages list names."""

from __future__ import annotations

from collections.abc import Sequence


def some(names: Sequence[str], most: int = 5) -> str:
    """The first names in backticks, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f"`{short(one_line(name))}`" for name in names[:most]) + more


def one_line(name: object) -> str:
    """A name that a file gave, of bounded length, without line breaks and other characters that a terminal would act on."""
    try:
        text = short(str(name), 300)
    except ValueError:  # more digits than Python prints
        return type(name).__name__
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")


def short(text: str, most: int = 200) -> str:
    """The beginning of a text that may be long without end."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def kind_of(name: str) -> str:
    """A module's name with a star for each number: the layers of a stack are of one kind."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def reason(error: Exception, most: int = 200) -> str:
    """What an exception of another library says, in one line."""
    return short(one_line(" ".join(str(error).split())), most) or type(error).__name__
