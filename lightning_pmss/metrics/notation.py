r"""Bring the notations of numbers into one spelling.

Models write one number in many ways: ``9{,}500``, ``9 500``, ``$9500``, ``\frac{19000}{2}``, ``9.5 \times 10^3``.
`plain` brings a text into one spelling; `lightning_pmss.metrics.exact` reads numbers in it.
"""

from __future__ import annotations

import re
import unicodedata

GLUE = "\u00a0"
"""Stands for each blank that does not end a number: no-break, thin and figure spaces, TeX's ``\\,`` and ``~``."""
CURRENCY = "\u00a4"
"""Stands for each currency sign, and for the dollar signs around a formula."""

_SPELLINGS = {
    "\u2212": "-",  # the minus sign; dashes are known by their category
    **dict.fromkeys("\u2018\u2019\u02bc", "'"),
    "\u066b": ".",  # the Arabic decimal sign, and the one between thousands
    "\u066c": ",",
    **dict.fromkeys("\u00f7\u2044\u2215", "/"),
    **dict.fromkeys("\u00d7\u00b7\u22c5\u2219\u2217", "*"),
    "\u221a": "\\sqrt ",
    "\u03c0": "\\pi ",
    "\u00b1": "\\pm ",
    "\u00b0": " degrees ",
}
_RAISED = "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207a\u207b"
_SUPERSCRIPTS = re.compile(f"[{_RAISED}]+")
_LEVEL = str.maketrans(_RAISED, "0123456789+-")

_END = r"(?![A-Za-z])"
_TEX = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (r"<<[^<>\n]*>>", ""),  # GSM8K's calculator annotations
        (rf"\\(?:left|right|displaystyle|limits|[bB]igg?){_END}|\\[!/]", ""),
        (r"(?<=\d)(?:\\text\s*)?\{\s*([.,'])\s*\}(?=\D{0,3}\d)", r"\1"),
        (rf"\\(?:[,:;> ]|(?:thin|med|thick)space{_END} ?)|~|&nbsp;|&thinsp;", GLUE),
        (rf"\\q?quad{_END}|\\\\", " "),
        (rf"\\(?:{CURRENCY}|(?:dollar|pounds|euro|textdollar|texteuro|textsterling){_END}|[()\[\]])", CURRENCY),
        (rf"\\(?:percent{_END}|%)", "%"),
        (r"\\(?:text)?color\s*\{[^{}]*\}", ""),
        (r"\\([#&_{}])", r"\1"),
        (rf"\\(?:times|cdot|ast){_END}", "*"),
        (rf"\\div{_END}", "/"),
        (rf"\^\s*(?:\\circ{_END}|\{{\s*\\circ\s*\}})|\\(?:text)?degrees?{_END}", " degrees "),
        (r"(?<=[A-Za-z)])_(?:\{[^{}]*\}|\w)", ""),  # an index is no part of a value
        (r"(?<=\d)\*\*(?=[-+]?\d)", "^"),  # a power as programs spell it; else Markdown's bold
        (r"\*{2,}|`|(?<!\w)_+(?=\S)|(?<=\S)_+(?!\w)", ""),
        (f",{GLUE}+(?=\\d)", ","),
    )
)
_WRAPPED = re.compile(
    r"\\(?:boxed|fbox|text|text(?:bf|it|rm|sf|tt)|math(?:rm|bf|it|sf|tt)|mbox|emph|underline|num)\s*\{([^{}]*)\}"
)
_DEPTH = 8  # of commands in each other
_PART = r"(?:\{\s*([-+]?[\d.,]+)\s*\}|\s*(\d))"
_FRACTION = re.compile(rf"\\[dtc]?frac\s*{_PART}\s*{_PART}")


def _character(char: str) -> str:
    if char in _SPELLINGS:
        return _SPELLINGS[char]
    category = unicodedata.category(char)
    if category == "Nd":
        return str(unicodedata.decimal(char))
    if category in ("Pd", "Zs", "Sc", "Cf"):  # dashes, blanks, currencies, signs without width
        return {"Pd": "-", "Zs": GLUE, "Sc": CURRENCY, "Cf": ""}[category]
    kind, _, codes = unicodedata.decomposition(char).partition(" ")
    if kind == "<fraction>":
        return f" {''.join(chr(int(code, 16)) for code in codes.split())} ".replace("\u2044", "/")
    if kind == "<sub>":
        return ""
    return unicodedata.normalize("NFKC", char) if kind in ("<wide>", "<narrow>", "<small>", "<compat>") else char


def typography(text: str) -> str:
    r"""Return ``text`` with one character for all that mean the same in a number.

    Digits of all scripts become 0 to 9, dashes ``-``, no-break and thin spaces `GLUE`, currency signs
    `CURRENCY`, superscripts ``^{...}``, one half `` 1/2 ``, full-width signs plain ones.
    """
    if not text.isascii():
        text = _SUPERSCRIPTS.sub(lambda match: f"^{{{match[0].translate(_LEVEL)}}}", text)
        text = "".join(char if char.isascii() else _character(char) for char in text)
    return text.replace("$", CURRENCY)


def plain(text: str) -> str:
    """Return ``text`` in one spelling: `typography`, without the commands of TeX and Markdown that set a number."""
    text = typography(text)
    for old, new in _TEX:
        text = old.sub(new, text)
    for _ in range(_DEPTH):
        text = _FRACTION.sub(_quotient, _WRAPPED.sub(r"\1", text))
    return text


def _quotient(match: re.Match[str]) -> str:
    return f" {match[1] or match[2]}/{match[3] or match[4]} "
