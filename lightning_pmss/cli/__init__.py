"""The command line: Lightning's ``fit``, ``validate``, ``test`` and ``predict`` with an adapter, and tools beside them.

A tool starts without Lightning, which takes seconds to import: only what it needs is imported, when it is called.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import lazy_loader

from lightning_pmss.cli.tools import TOOLS, run_tool

if TYPE_CHECKING:
    from lightning_pmss.cli.lightning import PMSSCLI as PMSSCLI

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={"lightning": ["PMSSCLI"]})
__all__ += ["TOOLS", "main"]


def main(args: Sequence[str] | None = None) -> Any:
    """Run one command.

    Args:
        args: Command line without the program's name; by default that of the process.

    Raises:
        SystemExit: With code 2, after a message on stderr, if what was typed cannot be done.
    """
    given = list(sys.argv[1:] if args is None else args)
    if given and given[0] in TOOLS:
        return run_tool(*given)
    from lightning_pmss.cli.lightning import run

    return run(given, args is None)
