"""Numbers in texts, exactly: what the corrected rules compare."""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction

_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+|(?<=\d))(?:\s*/\s*\d+(?:\.\d+)?)?")


def exact_number(text: str) -> Fraction | None:
    """Return the first number of ``text``: whole, decimal or a quotient, thousands with commas; ``None`` without one."""
    match = _NUMBER.search(text)
    if match is None:
        return None
    top, _, bottom = match.group().replace(",", "").partition("/")
    try:
        number = Fraction(Decimal(top.strip()))
        return number / Fraction(Decimal(bottom.strip())) if bottom else number
    except (ArithmeticError, ValueError):
        return None
