"""Imports flow one way: no room (folder) of the package imports from one that imports from it, directly or through others."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import lightning_pmss

PACKAGE = Path(lightning_pmss.__file__).parent


def rooms_imported(file: Path) -> Iterator[str]:
    """Names below the package that a file imports when it is loaded itself."""
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning_pmss."):
            yield str(node.module).split(".")[1]


def graph(package: Path) -> dict[str, set[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    for file in package.rglob("*.py"):
        room = file.relative_to(package).parts[0].removesuffix(".py")
        found[room] |= set(rooms_imported(file)) - {room}
    return found


def test_no_circle_of_rooms() -> None:
    assert len(list(TopologicalSorter(graph(PACKAGE)).static_order())) >= 15


def test_contributing_lists_the_rooms_in_the_order_of_their_imports() -> None:
    page = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    listed = [name.removesuffix(".py").rstrip("/") for name in re.findall(r"^\| `([\w./]+)` \|", page, re.MULTILINE)]
    imports = graph(PACKAGE)
    assert sorted(listed) == sorted(set(imports) - {"__init__"})
    for place, room in enumerate(listed):
        assert imports[room] <= set(listed[:place]), room


def test_a_circle_is_found(tmp_path: Path) -> None:
    for room, other in (("a", "b"), ("b", "c"), ("c", "a")):
        (tmp_path / room).mkdir()
        (tmp_path / room / "x.py").write_text(f"from lightning_pmss.{other}.x import y\n")
    with pytest.raises(CycleError):
        list(TopologicalSorter(graph(tmp_path)).static_order())
