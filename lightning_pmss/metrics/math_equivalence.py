r"""Equivalence of answers to MATH.

It is the string rule of "Measuring Mathematical Problem Solving With the MATH Dataset" (Hendrycks et al. 2021,
``hendrycks/math``, ``modeling/math_equivalence.py``), and a corrected form of it.
"""

from __future__ import annotations

import contextlib
import re
from fractions import Fraction

from lightning_pmss.metrics.exact import only_number
from lightning_pmss.metrics.notation import CURRENCY, GLUE, typography

_FRACTION = re.compile(r"(-?)\\frac\{(-?\d+)\}\{(-?\d+)\}")
_DECIMAL = re.compile(r"-?(\d+\.?\d*|\.\d+)")
_TEXT = re.compile(r"\\(?:text|mbox|textbf|mathrm|textrm)\{\s*([^{}]*?)\s*\}")
_UNITS = re.compile(r"(?<=[\d}])\\(?:text|mbox|mathrm|textrm)\{[^{}]*\}(\^\{?\d\}?)?")
_LAST_UNIT = re.compile(r"(?<=[\d}])(?:\s|\\[,;:! ]|~)*\\(?:text|mbox|mathrm|textrm)\{[^{}]*\}(\^\{?\d\}?)?[\s.$]*$")
_NAMED = re.compile(r"[A-Za-z]\\in|[A-Za-z](\([A-Za-z]\))?=")


def last_boxed(text: str, strict: bool = False) -> str | None:
    r"""Return the content of the last ``\boxed{...}`` of ``text``, ``None`` if there is none. Braces are matched.

    Args:
        text: A solution.
        strict: As the published rule reads it; else ``\fbox{5}`` and ``\boxed 5`` give ``5`` too.
    """
    start = text.rfind("\\boxed")
    if start < 0 and not strict:
        start = text.rfind("\\fbox")
    if start < 0:
        return None
    rest = text[start:].split("box", 1)[1].removeprefix("ed")
    if not rest.startswith("{"):
        word = None if strict else re.match(r" ([^\s$]+)", rest)
        return word[1] if word else None
    depth = 0
    for place, char in enumerate(rest):
        depth += (char == "{") - (char == "}")
        if depth == 0:
            return rest[1:place]
    return None


def _brace_fractions(text: str) -> str:
    head, *parts = text.split("\\frac")
    out = head
    for part in parts:
        out += "\\frac"
        if part[0] == "{":
            out += part
        elif len(part) < 2:
            return text
        elif part[1] == "{":
            out += f"{{{part[0]}}}{part[1:]}"
        else:
            out += f"{{{part[0]}}}{{{part[1]}}}{part[2:]}"
    return out


def _brace_roots(text: str) -> str:
    head, *parts = text.split("\\sqrt")
    return head + "".join("\\sqrt" + (part if part[0] == "{" else f"{{{part[0]}}}{part[1:]}") for part in parts)


def _slash_to_fraction(text: str) -> str:
    match = re.fullmatch(r"(0|-?[1-9]\d*)/(0|-?[1-9]\d*)", text)
    return f"\\frac{{{match[1]}}}{{{match[2]}}}" if match else text


def strip_string(text: str) -> str:
    r"""Return ``text`` in the form that the published rule compares.

    Raises:
        ValueError: If it has two units ``\text{ ``.
        IndexError: If a fraction or a root ends the text. In both cases the rule compares the texts as they are.
    """
    for old, new in (
        ("\n", ""),
        ("\\!", ""),
        ("\\\\", "\\"),
        ("tfrac", "frac"),
        ("dfrac", "frac"),
        ("\\left", ""),
        ("\\right", ""),
        ("^{\\circ}", ""),
        ("^\\circ", ""),
        ("\\$", ""),
    ):
        text = text.replace(old, new)
    if text.count("\\text{ ") > 1:
        raise ValueError(f"two units in {text!r}")
    text = text.split("\\text{ ")[0]
    text = text.replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.")
    if not text:
        return text
    if text[0] == ".":
        text = "0" + text
    sides = text.split("=")
    if len(sides) == 2 and len(sides[0]) <= 2:
        text = sides[1]
    text = _brace_fractions(_brace_roots(text).replace(" ", ""))
    return _slash_to_fraction("\\frac{1}{2}" if text == "0.5" else text)


def equivalent(first: str, second: str) -> bool:
    """Return whether two answers are the same by the published rule."""
    try:
        return strip_string(first) == strip_string(second)
    except (ValueError, IndexError):
        return first == second


def _value(text: str) -> Fraction | None:
    match = _FRACTION.fullmatch(text)
    if match is not None:
        bottom = int(match[3])
        value = Fraction(int(match[2]), bottom) if bottom else None
        return -value if match[1] and value is not None else value
    return only_number(text) if _DECIMAL.fullmatch(text) else None


def _number(text: str) -> Fraction | None:
    number = only_number(text)
    return only_number(_LAST_UNIT.sub("", text)) if number is None else number


def _tidy(text: str) -> str:
    text = typography(text).replace(GLUE, "").replace(CURRENCY, "$")
    text = text.strip().rstrip(".").strip().strip("$").strip()
    text = re.sub(r"\\[,;:!]|\\ |~|\\displaystyle", "", text)
    text = text.replace("{,}", "")
    if not re.search(r"[(\[{]", text):  # in a pair or a set a comma separates
        text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = _UNITS.sub("", text.replace("\\$", "").replace("$", ""))
    text = _TEXT.sub(r"\1", text)
    text = re.sub(r"\\(?:circ|degree)s?(?![A-Za-z])", "", text.replace("^{\\circ}", "").replace("^\\circ", ""))
    bare = text.replace(" ", "").replace("\\%", "").replace("%", "")
    named = _NAMED.match(bare)
    return bare[named.end() :] if named and "=" not in bare[named.end() :] else bare


def equivalent_corrected(first: str, second: str) -> bool:
    """Return whether two answers are the same by the corrected rule, see ``MATHAccuracy``."""
    numbers = [_number(text) for text in (first, second)]
    if None not in numbers:  # without blanks, as the published rule compares them, "1 1/2" would be "11/2"
        return numbers[0] == numbers[1]
    if equivalent(first, second):
        return True
    sides = []
    for text in (first, second):
        tidy = _tidy(text)
        with contextlib.suppress(ValueError, IndexError):
            tidy = strip_string(tidy)
        sides.append(tidy)
    if sides[0] == sides[1]:
        return bool(sides[0]) or first.strip() == second.strip()
    values = [_value(side) for side in sides]
    return values[0] is not None and values[0] == values[1]
