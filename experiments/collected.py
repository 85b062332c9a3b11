"""Results of ``tune`` and ``enough``, kept by the name of the study: one machine need not have run them all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def keep(record: Path, found: Mapping[str, Any]) -> Path:
    """Add studies to a record; one of the same name is replaced, the others stay.

    Args:
        record: The JSON file.
        found: Result by the name of the study.
    """
    before = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    together = dict(sorted({**before, **found}.items()))
    record.write_text(json.dumps(together, indent=1) + "\n", encoding="utf-8")
    return record
