"""Read strict JSON; refuse in one sentence everything that Python's reader lets through or crashes on."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from lightning_pmss.store.unreadable import refuse_unreadable

_LARGEST = 2**28  # bytes; the config of an adapter with thousands of layers is a few MB


def read_json(file: Path, remedy: str, where: str | None = None) -> Any:
    """Read a JSON file.

    Args:
        file: Its path.
        remedy: Remedy for a damaged one, a whole sentence.
        where: Beginning of messages; default: the path.

    Raises:
        FileNotFoundError: There is no such file.
        PermissionError: It must not be read.
        ValueError: It is a folder, no UTF-8 text or no strict JSON, or larger than any file of ours.
    """
    refuse_unreadable(file)
    if (size := file.stat().st_size) > _LARGEST:
        raise ValueError(f"{file} has {size} bytes, far more than any file of this kind. {remedy}")
    return parse_json(file.read_bytes(), where or str(file), remedy)


def parse_json(content: bytes, where: str, remedy: str) -> Any:
    """Read the value of a JSON text.

    Args:
        content: The text in UTF-8.
        where: Its name for messages: a file, or a part of one.
        remedy: Remedy for a damaged one, a whole sentence.

    Raises:
        ValueError: See `json_value`.
    """
    try:
        value = json_value(content)
        if b"\\ud" in content.lower():  # half of a surrogate pair, which no encoding can write
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except ValueError as error:
        raise ValueError(f"{where} is not readable JSON ({error}). {remedy}") from error


def json_value(content: bytes, *, finite: bool = True) -> Any:
    """Read the value of a JSON text; errors say the reason alone.

    Args:
        content: The text in UTF-8.
        finite: Refuse NaN, Infinity and numbers beyond float64, which Python writes and JSON does not have.

    Raises:
        ValueError: Empty, not UTF-8, with a byte order mark, not JSON, nested too deeply, a key twice in one object, or a
            number that is not finite.
    """
    if not content.strip():
        raise ValueError("it is empty")
    if content.startswith(b"\xef\xbb\xbf"):
        raise ValueError("it begins with a byte order mark; save it as UTF-8 without one")
    strict: dict[str, Any] = {"parse_constant": _no_constant, "parse_float": _finite} if finite else {}
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=_once, **strict)
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:20]} is not a finite number")
    return value


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in found if keys.count(key) > 1)
        raise ValueError(f"the key {twice[:80]!r} is there twice")
    return found


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number of JSON")
