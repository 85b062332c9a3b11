r"""Read numbers in texts exactly, for the corrected rules.

A number is read whole or not at all: ``9{,}500`` is 9500 and never 9. ``9,5`` and ``1,8,0,0`` are ambiguous, so they are no
number.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

from lightning_pmss.metrics.notation import CURRENCY, GLUE, plain

_LARGEST_EXPONENT = 400  # beyond it a power is no answer, and its digits would fill the memory

_RUN = re.compile(rf"(?:(?<![\w.,])\.)?\d+(?:[,.'_ {GLUE}]\d+)*")
_DECIMALS = r"(\.\d+)?"
_NOTATIONS = tuple(
    (re.compile(pattern), decimal)
    for pattern, decimal in (
        (r"\d+(\.\d+)?|\.\d+", "."),
        *((rf"[1-9]\d{{0,2}}(?:{sign}\d{{3}})+{_DECIMALS}", ".") for sign in (",", "'", "_", " ", GLUE)),
        (rf"[1-9]\d?(?:,\d{{2}})+,\d{{3}}{_DECIMALS}", "."),  # as in India
        (r"[1-9]\d{0,2}(?:\.\d{3}){2,}", ","),  # as in most of Europe, where no other reading is left
        (rf"[1-9]\d{{0,2}}(?:[.' {GLUE}]\d{{3}})+,\d{{1,2}}", ","),
    )
)
_AMBIGUOUS = re.compile(r"[1-9]\d{0,2}")
_SIGN = re.compile(rf"([-+])([\s{GLUE}]*)[{CURRENCY}({{\[\s]*$")
_FOREIGN_BEFORE = re.compile(
    r",$|(?:\^\s*\{?|\\(?:sqrt|pm)\s*[{\[]?|\\[A-Za-z]+\s*(?:\{[^{}]*\})?\s*[{\[]|\+\s*/\s*-)[\s(]*$"
)
_MIXED = re.compile(r"\s+(?:and\s+)?(\d+)\s*/\s*(\d+)(?![\d./])")
_QUOTIENT = re.compile(r"\s*/\s*(-?(?:\d[\d.,]*\d|\d|\.\d+))(?!\s*/\s*\d)")
_POWER = re.compile(r"\s*\^\s*(?:\{\s*([-+]?\d+)\s*\}|([-+]?\d+))(?!\s*\^)")
_SCIENTIFIC = re.compile(r"\s*[*xX]\s*10\s*\^\s*(?:\{\s*([-+]?\d+)\s*\}|([-+]?\d+))(?!\s*\^)|[eE]([-+]?\d+)(?![\w.])")
_SCALE = re.compile(r"[\s-]*(hundred|thousand|million|billion|trillion)s?(?![A-Za-z])", re.IGNORECASE)
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_OPERATION = re.compile(
    rf"\s*[{CURRENCY}%]?\s*(?:[-+*/^xX]|times|plus|minus|divided by)[\s{CURRENCY}({{]*[-+]?\.?\d|\(\s*\d", re.IGNORECASE
)
# Signs that must not follow a number directly: together they would be a number that is not understood.
_FOREIGN_BEHIND = re.compile(
    rf"(?!:00(?!\d))[:.,'_/\\{GLUE}{CURRENCY}]+\d|,\s\d{{3}}(?!\d)"
    r"|(?:\.?|\s+)\\(?!(?:implies|iff|to|[Rr]ightarrow|neq?|leq?|geq?|approx|sim|(?:black)?square|qed)(?![A-Za-z]))[A-Za-z]"
    r"|\s*\^|[kKMB](?![A-Za-z])|\{"
)


class _Found(NamedTuple):
    value: Fraction
    start: int
    end: int


def _digits(run: str) -> Fraction | None:
    """Return the value of a run of digits and separators, ``None`` if it is ambiguous."""
    for pattern, decimal in _NOTATIONS:
        if pattern.fullmatch(run):
            kept = "".join(char for char in run if char.isdecimal() or char == decimal)
            return Fraction(kept.replace(decimal, "."))
    return None


def _unsigned(text: str, start: int, run: str) -> tuple[Fraction | None, int]:
    """Return the value of the run at ``start`` and where it ends; blanks in it part thousands, or two numbers."""
    value, end = _digits(run), start + len(run)
    if " " in run and (value is None or re.match(r"-[A-Za-z]", text[end:])):
        first, second, *_ = run.split(" ")  # in "12 100-pound bags" the blank parts two numbers
        if value is None and _AMBIGUOUS.fullmatch(first) and re.match(r"\d{3}(?!\d)", second):
            return None, end
        return _digits(first), start + len(first)
    return value, end


def _scaled(text: str, value: Fraction, end: int, whole: bool) -> tuple[Fraction | None, int]:
    """Return the value with its factors: a fraction, a power, a power of ten, a word such as million."""
    if whole and (match := _MIXED.match(text, end)):
        proper = 0 < int(match[1]) < int(match[2])
        return value + Fraction(int(match[1]), int(match[2])) if proper else None, match.end()
    if match := _QUOTIENT.match(text, end):
        bottom = _digits(match[1].removeprefix("-"))
        if not bottom:
            return None, match.end()
        return value / (-bottom if match[1][0] == "-" else bottom), match.end()
    if match := _POWER.match(text, end):
        exponent = int(match[1] or match[2])
        if abs(exponent) > _LARGEST_EXPONENT or (not value and exponent < 0):
            return None, match.end()
        return value**exponent, match.end()
    if match := _SCIENTIFIC.match(text, end):
        exponent = int(match[1] or match[2] or match[3])
        if abs(exponent) > _LARGEST_EXPONENT:
            return None, match.end()
        value, end = value * Fraction(10) ** exponent, match.end()
    while match := _SCALE.match(text, end):
        value, end = value * 10 ** _SCALES[match[1].lower()], match.end()
        if re.match(r"\s+(?:and\s+)?\d", text[end:]):  # "2 million 300 thousand"
            return None, end
    return value, end


def _negative(before: str) -> bool | None:
    """Return whether the sign in front of a number is a minus; ``None`` if that is ambiguous."""
    if _FOREIGN_BEFORE.search(before):
        return None
    match = _SIGN.search(before)
    if match is None or match[1] == "+":
        return False
    ahead = before[: match.start()]
    if ahead.rstrip().endswith(("-", "+")):
        return None
    parted = ahead != ahead.rstrip()
    if re.search(r"[\w)\]}%]$", ahead.rstrip()):  # behind a word: a hyphen, a dash between blanks, or a sign
        return parted and not match[2]
    return True


def _read(text: str) -> _Found | None:
    """Return the first number of a text in plain notation; of a calculation the number behind its equals sign."""
    offset = 0
    while match := _RUN.search(text, offset):
        value, end = _unsigned(text, match.start(), match.group())
        negative = _negative(text[offset : match.start()])
        if value is None or negative is None:
            return None
        value, end = _scaled(text, value, end, text[match.start() : end].isdecimal())
        if value is None:
            return None
        if not _OPERATION.match(text, end):
            if _FOREIGN_BEHIND.match(text, end) or ("." in match.group() and text.startswith("..", end)):
                return None
            return _Found(-value if negative else value, match.start(), end)
        equals = text.find("=", end)
        if equals < 0:
            return None
        offset = equals + 1
    return None


def exact_number(text: str) -> Fraction | None:
    r"""Return the first number of ``text``, ``None`` if there is none or it is ambiguous.

    It reads decimals, thousands separated by commas, blanks, apostrophes or TeX's ``{,}`` and ``\,``, fractions, powers,
    powers of ten, ``million``; digits of all scripts; signs and currencies in front, units behind. Of a calculation the
    result behind its ``=`` is read.

    Example::

        >>> exact_number(r"so $9{,}500.50 per year")
        Fraction(19001, 2)
        >>> exact_number("9,50") is None
        True
    """
    try:
        found = _read(plain(text))
    except ValueError:  # more digits than Python reads
        return None
    return None if found is None else found.value


def only_number(text: str) -> Fraction | None:
    """Return the number that ``text`` is, with nothing but a sign, a currency or a percent sign around it, else ``None``."""
    spelt = plain(text)
    try:
        found = _read(spelt)
    except ValueError:
        return None
    if found is None or not re.fullmatch(rf"[\s{CURRENCY}]*[-+]?[\s{CURRENCY}]*", spelt[: found.start]):
        return None
    return found.value if re.fullmatch(rf"[\s{CURRENCY}%.]*(?:degrees)?[\s{CURRENCY}.]*", spelt[found.end :]) else None
