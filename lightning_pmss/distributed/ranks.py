"""What several processes do together, so that none waits for another that has failed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from lightning.pytorch.strategies import Strategy

T = TypeVar("T")


def together(strategy: Strategy, action: Callable[[], T]) -> T:
    """Run something on every rank; where it fails on one, an error is raised on all.

    Whatever `action` waits for the other ranks with must lie before the point at which it can fail on some of them only.

    Raises:
        Exception: What `action` raised on this rank, else on rank 0.
        RuntimeError: It failed on another rank than 0.
    """
    result: Any = None
    own: Exception | None = None
    try:
        result = action()
    except Exception as error:
        own = error
    if not strategy.reduce_boolean_decision(own is not None, all=False):
        return result  # type: ignore[no-any-return]
    first = strategy.broadcast(own)
    raise own or first or RuntimeError("another process failed; its own message says why")
