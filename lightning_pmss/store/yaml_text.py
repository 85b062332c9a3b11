"""Read YAML; a text that is none is refused with the place in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


def read_yaml(file: Path, kind: str, remedy: str) -> Any:
    """Read a YAML file.

    Args:
        file: Its path.
        kind: What it should be, such as ``"configuration"``.
        remedy: Last sentence of the refusal of a text that is no YAML.

    Raises:
        OSError: It is not there, or must not be read.
        ValueError: It is no UTF-8 text or no YAML; the message has file, line and column.
    """
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text (byte {error.start} is not UTF-8), and so no {kind}.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        raise ValueError(f"{file}{place}: {getattr(error, 'problem', None) or error}. {remedy}") from error
